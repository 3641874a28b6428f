"""The drop-ins against the code they replace, given the same draws."""

import copy
import importlib.metadata
import importlib.util
import inspect
import json
import os
import pickle
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sma_fast
from sma_fast import compat
from sma_fast.compat import RandomlySelectedCrossAttentionMasking as Masking

GOLDEN = (
    "image_cross",
    "image_cross_noise",
    "language_cross",
    "molecule_self",
    "molecule_self_mean",
    "physics_self",
    "protein_cross_wide",
)


def without(reason):
    """Skips, or fails where SMA_FAST_REQUIRE asks for the peers."""
    if "peers" in os.environ.get("SMA_FAST_REQUIRE", "").split(","):
        pytest.fail(reason)
    pytest.skip(reason)


def peer_file(distribution, path):
    """Returns the module in one file of an installed distribution, without importing its package:
    that would need torchvision, which the masking itself does not."""
    try:
        file = importlib.metadata.distribution(distribution).locate_file(path)
    except importlib.metadata.PackageNotFoundError:
        without(f"{distribution} is not installed: pip install --no-deps {distribution}")
    stubs = {
        "torchvision": {},
        "torchvision.ops": {"StochasticDepth": nn.Identity},
        "lightly": {},
        "lightly.utils": {"dependency": None},
    }
    name = "peer_" + Path(path).stem
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, name, module)
        for stub, content in stubs.items():
            patched.setitem(sys.modules, stub, ModuleType(stub))
            vars(sys.modules[stub]).update(content)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def timm_dropout(monkeypatch):
    module = peer_file("timm", "timm/layers/patch_dropout.py")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # for pickle
    return module


@pytest.fixture
def lightly_utils():
    return peer_file("lightly", "lightly/models/utils.py")


# The SMA authors' masking class


def load_golden(name):
    data = os.environ.get("SMA_FAST_DATA")
    root = Path(__file__).parents[1]
    file = (Path(data) / ".." if data else root.parent / "shared") / "golden" / f"{name}.npz"
    if not file.exists():
        pytest.skip(f"no golden data: {file}")
    with np.load(file) as archive:
        return {
            key: torch.as_tensor(archive[key]) if archive[key].dtype.kind != "U" else archive[key]
            for key in archive.files
            if not key.startswith(("weight/", "grad/"))
        }


def recorded_draws(data, masking, scale):
    """Returns the recorded draws as query_index, head_index and noise.

    Theirs shuffle lists: the queries, and, where noise is on, a list of candidates that depends on
    the scores. This says which of them were drawn, and gives all that were no candidates the
    lowest noise, so that drawing one of those would show.
    """
    logits, valid = data["attn_logits"], data["attention_mask"] == 1
    batch, heads, queries, tokens = logits.shape
    ratio, per_query = masking["masking_ratio"], masking["num_per_query"]
    ragged = masking["varying_length"]
    index = torch.full((batch, queries), -1)
    noise = torch.zeros(batch, tokens)
    for row in range(batch):
        own = int(valid[row].sum()) if ragged and queries == tokens else tokens
        drawn = data[f"randperm/{row}"][: round(own * ratio / per_query)]
        index[row, : len(drawn)] = drawn.sort().values
        if int(data["n_randperm"]) == batch:
            continue
        rows = logits[row, :, drawn].softmax(-1)  # (H, R, N)
        if "head_index" in data:
            scores = sum(rows[data["head_index"][row, query], i] for i, query in enumerate(drawn))
        else:
            scores = rows.mean(0).sum(0)
        if masking["mask_self"]:
            scores[drawn] = heads
        initial = masking["select_initial_ratio"]
        if ragged:
            count = round(ratio * (1 - initial * scale) * int(valid[row].sum()))
            others = valid[row].clone()
            others[scores.topk(count).indices] = False
            candidates = others.nonzero()[:, 0]
        else:
            candidates = scores.topk(round((ratio + (initial - ratio) * scale) * tokens)).indices
        order = candidates[data[f"randperm/{batch + row}"]]
        noise[row, order] = torch.linspace(0.1, 0.9, len(order))
    width = int((index >= 0).sum(1).max())
    index = index[:, :width]
    return {"query_index": index, "head_index": data.get("head_index"), "noise": noise}


@pytest.mark.parametrize("name", GOLDEN)
def test_masks_as_published(backend, name):
    data = load_golden(name)
    meta = json.loads(str(data["meta"]))
    masking = Masking(**meta["masking"])
    masking.set_noise_scale(meta["noise_scale"])
    draws = backend.inputs(recorded_draws(data, meta["masking"], meta["noise_scale"]))
    data = backend.inputs(data)
    logits, attention_mask = data["attn_logits"].clone(), data["attention_mask"].clone()
    loss_mask = torch.zeros_like(attention_mask)
    result = masking(
        logits,
        data["inputs"],
        attention_mask,
        loss_mask,
        input_ids="passed through",
        **draws,
    )
    assert torch.equal(attention_mask, data["attention_mask_out"])
    assert torch.equal(loss_mask, data["loss_mask"])
    assert list(result) == ["attentions", "inputs", "attention_mask", "loss_mask", "input_ids"]
    assert result["attention_mask"] is attention_mask and result["loss_mask"] is loss_mask
    assert result["inputs"] is data["inputs"] and result["input_ids"] == "passed through"
    assert torch.equal(result["attentions"], data["attn_logits"].softmax(-1))
    assert torch.equal(logits, data["attn_logits"])


@pytest.mark.parametrize("name", GOLDEN)
def test_counts_as_published_with_own_draws(name):
    data = load_golden(name)
    meta = json.loads(str(data["meta"]))
    masking = Masking(**meta["masking"])
    masking.set_noise_scale(meta["noise_scale"])
    attention_mask = data["attention_mask"].clone()
    loss_mask = torch.zeros_like(attention_mask)
    masking(data["attn_logits"], data["inputs"], attention_mask, loss_mask)
    assert torch.equal(loss_mask.sum(1), data["loss_mask"].sum(1))
    assert torch.equal(attention_mask + loss_mask, data["attention_mask"])


def test_signature_as_published():
    assert {k: p.default for k, p in inspect.signature(Masking).parameters.items()} == {
        "masking_ratio": 0.5,
        "num_per_query": 576,
        "exclude_seen_reconstruction": True,
        "varying_length": True,
        "relative_noise": 0.0,
        "select_initial_ratio": None,
        "mask_self": False,
        "head_aggregation": "mean",
        "kwargs": inspect.Parameter.empty,
    }
    masking = Masking(0.5, 4, name="taken")
    assert masking.noise_schedule_scale == 0.0
    masking.set_noise_scale(np.float64(0.25))
    assert masking.noise_schedule_scale == 0.25


def focused(attention_mask, focus, heads=2):
    """Logits of queries that each attend to one token: focus[m] is the token of query m."""
    batch, tokens = attention_mask.shape
    logits = torch.zeros(batch, heads, len(focus), tokens)
    logits[:, :, torch.arange(len(focus)), torch.as_tensor(focus)] = 30.0
    bias = (1.0 - attention_mask.float()) * torch.finfo(torch.float32).min
    return logits + bias[:, None, None, :]


def masked_by(masking, logits, attention_mask, **draws):
    """Returns the loss mask as bool, having checked that the two masks fit each other."""
    after, loss_mask = attention_mask.clone(), torch.zeros_like(attention_mask)
    masking(logits, None, after, loss_mask, **draws)
    assert torch.equal(after + loss_mask, attention_mask)
    return loss_mask == 1


def test_each_sample_draws_its_own_share_of_its_valid_tokens():
    # each token attends to itself and k = 1: what is masked is what was drawn
    attention_mask = torch.ones(4, 20, dtype=torch.int64)
    attention_mask[1, 10:] = 0
    attention_mask[2, ::2] = 0  # scattered, where the published class assumes padding on the right
    attention_mask[3] = 0
    logits = focused(attention_mask, range(20))
    masking = Masking(masking_ratio=0.3, num_per_query=1)
    times = torch.zeros(4, 20)
    for seed in range(100):
        torch.manual_seed(seed)
        masked = masked_by(masking, logits, attention_mask)
        assert masked.sum(1).tolist() == [6, 3, 3, 0]
        times += masked
    assert torch.equal(times > 0, attention_mask == 1)
    assert times[:3].max() < 55  # 30 expected, 4.6 standard deviation


def test_at_least_one_query_is_drawn():
    attention_mask = torch.ones(2, 8, dtype=torch.int64)
    logits = focused(attention_mask, [5, 5, 5])
    masked = masked_by(Masking(masking_ratio=0.25, num_per_query=576), logits, attention_mask)
    assert masked[:, 5].all() and masked.sum() == 4
    masked = masked_by(
        Masking(masking_ratio=0.25, num_per_query=576),
        focused(attention_mask, [5] * 8),
        attention_mask,
    )
    assert masked[:, 5].all() and masked.sum() == 4


@pytest.mark.parametrize("varying_length", [True, False])
def test_one_token_stays_visible(varying_length):
    attention_mask = torch.ones(1, 3, dtype=torch.int64)
    logits = focused(attention_mask, [2, 2, 0, 0])
    masking = Masking(masking_ratio=0.9, num_per_query=1, varying_length=varying_length)
    assert masked_by(masking, logits, attention_mask).sum() == 2
    masking = Masking(0.9, 1, varying_length=varying_length, select_initial_ratio=0.95)
    masking.set_noise_scale(0.6)
    assert masked_by(masking, logits, attention_mask).sum() == 2


@pytest.mark.parametrize("varying_length", [True, False])
def test_mask_self_masks_the_drawn_tokens_first(varying_length):
    # ten queries attend to token 0: its sum is 10, above the number of heads
    attention_mask = torch.ones(1, 20, dtype=torch.int64)
    logits = focused(attention_mask, [0] * 20)
    masking = Masking(0.5, 1, mask_self=True, varying_length=varying_length)
    drawn = torch.arange(5, 15)[None]
    assert (
        masked_by(masking, logits, attention_mask, query_index=drawn).nonzero()[:, 1].tolist()
        == drawn[0].tolist()
    )
    masking.mask_self = False
    assert masked_by(masking, logits, attention_mask, query_index=drawn)[0, 0]


def test_random_mix_takes_the_head_of_each_query():
    # head 0 attends to token 0, head 1 to token 1
    attention_mask = torch.ones(1, 8, dtype=torch.int64)
    logits = torch.zeros(1, 2, 3, 8)
    logits[:, 0, :, 0] = logits[:, 1, :, 1] = 30.0
    masking = Masking(0.125, 1, head_aggregation="random_mix")
    heads = torch.tensor([[0, 1, 0]])
    for query, token in ((0, 0), (1, 1)):
        draws = {"query_index": torch.tensor([[query]]), "head_index": heads}
        masked = masked_by(masking, logits, attention_mask, **draws)
        assert masked[0].nonzero().tolist() == [[token]]
    seen = torch.zeros(8, dtype=torch.bool)
    for seed in range(20):
        torch.manual_seed(seed)
        seen |= masked_by(masking, logits, attention_mask)[0]
    assert seen.nonzero()[:, 0].tolist() == [0, 1]


@pytest.mark.parametrize("varying_length", [True, False])
def test_annealing_goes_from_random_to_guided(varying_length):
    attention_mask = torch.ones(1, 40, dtype=torch.int64)
    logits = torch.arange(40.0).expand(1, 2, 4, 40)  # the last tokens have the highest scores
    masking = Masking(0.25, 4, varying_length=varying_length, select_initial_ratio=1.0)
    masking.set_noise_scale(0.0)
    assert masked_by(masking, logits, attention_mask)[0].nonzero()[:, 0].tolist() == [
        *range(30, 40)
    ]
    masking.set_noise_scale(0.5)
    times = torch.zeros(2, 40)
    for seed in range(60):
        torch.manual_seed(seed)
        masked = masked_by(masking, logits, attention_mask)[0]
        assert masked.sum() == 10
        times[0] += masked
    if varying_length:  # 0.125 of 40 by score, and 5 of the other 35
        assert (times[0, 35:] == 60).all() and (times[0, :35] > 0).all()
        assert times[0, :35].max() < 25  # 8.6 expected
    else:  # 10 of the top 0.625 of 40
        assert (times[0, :15] == 0).all() and (times[0, 15:] > 5).all()
        assert times[0, 15:].max() < 45  # 24 expected
    masking.set_noise_scale(1.0)
    for seed in range(60):
        torch.manual_seed(seed)
        times[1] += masked_by(masking, logits, attention_mask)[0]
    assert times[1].sum() == 600 and times[1].min() > 2 and times[1].max() < 35  # 15 expected


def test_both_parts_of_a_ragged_row_are_rounded():
    # half of 3 is 1.5, so 2 by score and 2 at random
    attention_mask = torch.ones(1, 30, dtype=torch.int64)
    masking = Masking(0.1, 3, select_initial_ratio=1.0)
    masking.set_noise_scale(0.5)
    masked = masked_by(masking, torch.arange(30.0).expand(1, 2, 4, 30), attention_mask)
    assert masked.sum() == 4 and masked[0, 28:].all()


def test_pool_below_the_masking_ratio():
    # the published class masks the whole pool then
    attention_mask = torch.ones(1, 40, dtype=torch.int64)
    masking = Masking(0.5, 5, varying_length=False, select_initial_ratio=0.25)
    masking.set_noise_scale(0.5)
    masked = masked_by(masking, torch.arange(40.0).expand(1, 2, 4, 40), attention_mask)
    assert masked[0].nonzero()[:, 0].tolist() == [*range(25, 40)]


def test_rounding_is_the_contracts():
    # 0.15 * 190 is 28.5 in float64 and 28.500001 in float32, which the published class rounds to 29
    attention_mask = torch.ones(1, 190, dtype=torch.int64)
    logits = torch.randn(1, 1, 8, 190)
    assert round(0.15 * 190) == 28 and int((0.15 * torch.tensor(190)).round()) == 29
    assert masked_by(Masking(0.15, 10), logits, attention_mask).sum() == 28


def test_loss_over_all_valid_tokens():
    attention_mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    before, loss_mask = attention_mask.clone(), torch.zeros_like(attention_mask)
    masking = Masking(0.5, 1, exclude_seen_reconstruction=False)
    masking(focused(attention_mask, [0, 0, 1, 1]), None, attention_mask, loss_mask)
    assert torch.equal(loss_mask, before)
    assert attention_mask.sum() == 2


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.bfloat16])
def test_mask_dtypes_and_no_loss_mask(dtype):
    attention_mask = torch.ones(2, 8, dtype=dtype)
    result = Masking(0.5, 2)(focused(attention_mask, [0, 1, 2]), None, attention_mask)
    assert result["loss_mask"] is None
    assert attention_mask.dtype is dtype and (attention_mask == 1).sum(1).tolist() == [4, 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_gradient(dtype):
    logits = torch.randn(2, 2, 5, 12, dtype=dtype, requires_grad=True)
    attention_mask = torch.ones(2, 12, dtype=torch.int64)
    result = Masking(0.5, 3)(logits, None, attention_mask)
    assert result["attentions"].dtype is dtype
    result["attentions"][:, :, :, 0].sum().backward()
    assert logits.grad.abs().sum() > 0
    assert attention_mask.sum(1).tolist() == [6, 6]


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 2, 3, 0), (2, 2, 0, 0), (1, 1, 1, 1)])
def test_empty(shape):
    attention_mask = torch.ones(shape[0], shape[3], dtype=torch.int64)
    masked = masked_by(Masking(0.5, 2), torch.zeros(shape), attention_mask)
    assert masked.shape == (shape[0], shape[3]) and not masked.any() or shape[0] == 0


MASKING_CASES = [
    pytest.param(queries, arguments, id=f"{queries}-{'-'.join(map(str, arguments.values()))}")
    for queries, arguments in (
        (6, {"varying_length": True}),
        (6, {"varying_length": False, "select_initial_ratio": 0.9}),
        (16, {"varying_length": True, "select_initial_ratio": 0.5}),
        (16, {"varying_length": True, "mask_self": True, "head_aggregation": "random_mix"}),
        (16, {"varying_length": False, "mask_self": True, "head_aggregation": "random_mix"}),
    )
]


@pytest.mark.parametrize(("queries", "arguments"), MASKING_CASES)
def test_never_waits_for_the_device_nor_leaves_it(queries, arguments):
    # a meta tensor has no values to look at, and an op on two devices raises
    masking = Masking(0.5, 4, **arguments)
    masking.set_noise_scale(0.5)
    logits = torch.empty(3, 2, queries, 16, device="meta")
    attention_mask = torch.empty(3, 16, dtype=torch.int64, device="meta")
    result = masking(logits, None, attention_mask, torch.empty_like(attention_mask))
    assert result["attentions"].shape == logits.shape
    assert result["attentions"].is_meta and result["attention_mask"] is attention_mask


@pytest.mark.parametrize(("queries", "arguments"), MASKING_CASES)
def test_compiles_into_one_graph(queries, arguments):
    masking = Masking(0.5, 4, **arguments)
    masking.set_noise_scale(0.5)

    def step(logits, attention_mask):
        return masking(logits, None, attention_mask, torch.zeros_like(attention_mask))

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    attention_mask = torch.ones(3, 16, dtype=torch.int64)
    result = compiled(torch.randn(3, 2, queries, 16), attention_mask)
    assert result["loss_mask"].sum(1).tolist() == [8, 8, 8]
    assert torch.equal(attention_mask + result["loss_mask"], torch.ones_like(attention_mask))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    ratio=st.integers(0, 20).map(lambda x: x / 20),
    self_attention=st.booleans(),
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    scale=st.integers(0, 10).map(lambda x: x / 10),
    initial=st.none() | st.integers(0, 10).map(lambda x: x / 10),
    mix=st.sampled_from(["mean", "random_mix"]),
)
def test_masks_its_share_of_valid_tokens(seed, ratio, self_attention, lengths, scale, initial, mix):
    torch.manual_seed(seed)
    attention_mask = torch.zeros(len(lengths), 12, dtype=torch.int64)
    for row, length in zip(attention_mask, lengths, strict=True):
        row[torch.randperm(12)[:length]] = 1
    logits = torch.randn(len(lengths), 2, 12 if self_attention else 5, 12)
    logits += (1 - attention_mask[:, None, None]) * torch.finfo(torch.float32).min
    masking = Masking(
        ratio,
        3,
        select_initial_ratio=initial,
        mask_self=self_attention,
        head_aggregation=mix,
    )
    masking.set_noise_scale(scale)
    masked = masked_by(masking, logits, attention_mask)
    for length, number in zip(lengths, masked.sum(1).tolist(), strict=True):
        if initial is None or scale == 0:
            wanted = round(ratio * length)
        else:
            wanted = round(ratio * (1 - initial * scale) * length)
            wanted += round(ratio * initial * scale * length)
        assert number == min(wanted, max(length - 1, 0))


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"masking_ratio": 1.5}, ValueError, "masking_ratio"),
        ({"masking_ratio": "half"}, TypeError, "masking_ratio"),
        ({"num_per_query": 0}, ValueError, "num_per_query"),
        ({"num_per_query": float("nan")}, ValueError, "num_per_query"),
        ({"num_per_query": True}, TypeError, "num_per_query"),
        ({"num_per_query": "4"}, TypeError, "num_per_query"),
        ({"mask_self": 1}, TypeError, "mask_self"),
        ({"mask_self": None}, TypeError, "mask_self"),
        ({"select_initial_ratio": -0.1}, ValueError, "select_initial_ratio"),
        ({"head_aggregation": "max"}, ValueError, "head_aggregation"),
    ],
)
def test_wrong_arguments_of_the_class(arguments, error, name):
    with pytest.raises(error, match=name):
        Masking(**arguments)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        ({"attentions": torch.zeros(2, 3, 8)}, ValueError, "attentions"),
        ({"attentions": torch.zeros(2, 2, 3, 8, dtype=torch.int64)}, TypeError, "attentions"),
        ({"attentions": torch.zeros(2, 0, 3, 8)}, ValueError, "attentions"),
        ({"attentions": torch.zeros(2, 2, 3, 8).to_sparse()}, TypeError, "attentions"),
        ({"attention_mask": None}, TypeError, "attention_mask"),
        ({"attention_mask": torch.ones(2, 7)}, ValueError, "attention_mask"),
        ({"attention_mask": torch.ones(1, 8)}, ValueError, "attention_mask"),
        ({"loss_mask": torch.ones(2, 9)}, ValueError, "loss_mask"),
        ({"loss_mask": [1]}, TypeError, "loss_mask"),
        ({"query_index": torch.zeros(3, 2, dtype=torch.int64)}, ValueError, "query_index"),
        ({"query_index": torch.full((2, 1), 3)}, ValueError, "query_index"),
        ({"query_index": [0]}, TypeError, "query_index"),
        ({"head_index": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "head_index"),
        ({"noise": torch.rand(2, 7)}, ValueError, "noise"),
    ],
)
def test_wrong_arguments_of_the_call(call, error, name):
    masking = Masking(0.5, 2, select_initial_ratio=1.0, head_aggregation="random_mix")
    masking.set_noise_scale(0.5)
    right = {
        "attentions": torch.zeros(2, 2, 3, 8),
        "inputs": None,
        "attention_mask": torch.ones(2, 8),
        "loss_mask": torch.zeros(2, 8),
    }
    masking(**copy.deepcopy(right))
    with pytest.raises(error, match=name):
        masking(**(right | call))


def test_what_the_published_class_would_have_hidden_raises():
    cross = {"attentions": torch.zeros(1, 1, 2, 8), "inputs": None}
    with pytest.raises(ValueError, match="num_per_query: got 1, which draws 4 of 2 queries"):
        Masking(0.5, 1)(**cross, attention_mask=torch.ones(1, 8))
    with pytest.raises(ValueError, match="mask_self: got True with 2 queries and 8 tokens"):
        Masking(0.5, 4, mask_self=True)(**cross, attention_mask=torch.ones(1, 8))
    with pytest.raises(ValueError, match="noise_scale"):
        Masking().set_noise_scale(1.5)


# MAE


def mae_formula(x, mask_ratio):
    """facebookresearch/mae's masking: shuffle the tokens by noise and cut the shuffled row."""
    order = torch.rand(x.shape[:2], device=x.device).argsort(dim=1)
    place = order.argsort(dim=1)  # of each token in the shuffled row
    keep = int(x.shape[1] * (1 - mask_ratio))
    kept = x.take_along_dim(order[:, :keep, None], dim=1)
    return kept, (place >= keep).float(), place


class TinyMAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.mask_token = nn.Parameter(torch.randn(16))
        self.decoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def random_masking(self, x, mask_ratio):
        return mae_formula(x, mask_ratio)

    def forward(self, x, mask_ratio=0.75):
        visible, mask, ids_restore = self.random_masking(x, mask_ratio)
        visible = self.encoder(visible)
        fill = self.mask_token.expand(x.shape[0], x.shape[1] - visible.shape[1], -1)
        full = torch.cat([visible, fill], 1).take_along_dim(ids_restore[:, :, None], 1)
        error = (self.decoder(full) - x).square().mean(-1)
        return (error * mask).sum() / mask.sum(), mask


@pytest.mark.parametrize("mask_ratio", [0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("tokens", [1, 16, 63])
def test_mae_random_masking(tokens, mask_ratio):
    x = torch.randn(3, tokens, 5)
    torch.manual_seed(1)
    visible, mask, ids_restore = mae_formula(x, mask_ratio)
    torch.manual_seed(1)
    ours = compat.mae_random_masking(x, mask_ratio)
    assert [t.dtype for t in ours] == [visible.dtype, mask.dtype, ids_restore.dtype]
    assert [t.shape for t in ours] == [visible.shape, mask.shape, ids_restore.shape]
    assert torch.equal(ours[1], mask)
    fill = x.new_zeros(3, tokens - visible.shape[1], 5)
    for kept, ids in ((visible, ids_restore), (ours[0], ours[2])):
        restored = torch.cat([kept, fill], 1).take_along_dim(ids[:, :, None], 1)
        assert torch.equal(restored, x * (1 - mask[:, :, None]))


def test_patched_mae_computes_the_same():
    torch.manual_seed(0)
    model, x = nn.Sequential(TinyMAE()), torch.randn(4, 20, 16)

    def step(model):
        model.zero_grad()
        torch.manual_seed(3)
        loss, mask = model(x)
        loss.backward()
        return loss.detach(), mask, [p.grad.clone() for p in model.parameters()]

    before = step(model)
    rng = torch.get_rng_state()
    assert compat.patch(model) == ["0.random_masking"]
    assert torch.equal(torch.get_rng_state(), rng)
    assert model[0].random_masking is compat.mae_random_masking
    after = step(model)
    assert torch.equal(after[1], before[1])
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step(pickle.loads(pickle.dumps(model))), after)
    torch.testing.assert_close(step(copy.deepcopy(model)), after)
    assert compat.patch(model) == ["0.random_masking"]
    compat.unpatch(model)
    assert "random_masking" not in vars(model[0])
    torch.testing.assert_close(step(model), before, rtol=0, atol=0)


class OtherOrder(nn.Module):
    def random_masking(self, x, mask_ratio):
        visible, mask, ids_restore = mae_formula(x, mask_ratio)
        return ids_restore, visible, mask


class FourResults(nn.Module):
    def random_masking(self, x, mask_ratio):
        return *mae_formula(x, mask_ratio), None


class KeepsTheMasked(nn.Module):
    def random_masking(self, x, mask_ratio):
        visible, mask, ids_restore = mae_formula(x, mask_ratio)
        return visible, 1 - mask, ids_restore


class ReturnsTheOrder(nn.Module):
    def random_masking(self, x, mask_ratio):
        visible, mask, ids_restore = mae_formula(x, mask_ratio)
        return visible, mask, ids_restore.argsort(dim=1)


class KeepsTheFirst(nn.Module):
    def random_masking(self, x, mask_ratio):
        keep = int(x.shape[1] * (1 - mask_ratio))
        place = torch.arange(x.shape[1]).expand(x.shape[:2])
        return x[:, :keep], (place >= keep).float(), place


class HasADefault(nn.Module):
    def random_masking(self, x, mask_ratio=0.75):
        return mae_formula(x, mask_ratio)


class Fails(nn.Module):
    def random_masking(self, x, mask_ratio):
        return self.not_there(x)


class OtherArguments(nn.Module):
    def random_masking(self, pixel_values, noise=None):
        return mae_formula(pixel_values, 0.5)


@pytest.mark.parametrize(
    "kind",
    [
        OtherOrder,
        FourResults,
        KeepsTheMasked,
        ReturnsTheOrder,
        KeepsTheFirst,
        HasADefault,
        Fails,
        OtherArguments,
        nn.ReLU,
    ],
)
def test_patch_leaves_other_masking_alone(kind):
    model = nn.Sequential(kind(), nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match="got Sequential.*random_masking.*ViTMAE.*PatchDropout.*lightly"
    ):
        compat.patch(model)
    assert "random_masking" not in vars(model[0])
    assert compat.patch(nn.Sequential(model, TinyMAE())) == ["1.random_masking"]


@pytest.mark.parametrize("model", [None, "model", TinyMAE])
def test_patch_takes_models_only(model):
    with pytest.raises(TypeError, match="model: got"):
        compat.patch(model)


def test_patch_names_an_empty_python_module():
    with pytest.raises(ValueError, match="model: got json"):
        compat.patch(json)


# Hugging Face


@pytest.fixture
def vit_mae():
    try:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
    except ImportError as error:
        without(str(error))
    torch.manual_seed(0)
    config = ViTMAEConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        decoder_hidden_size=24,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=48,
        image_size=32,
        patch_size=4,
        mask_ratio=0.7,
        initializer_range=0.2,
    )
    return ViTMAEForPreTraining(config).eval()


@pytest.mark.parametrize("noise_dtype", [torch.float32, torch.float64, None])
def test_vit_mae_computes_the_same(vit_mae, noise_dtype):
    images = torch.randn(3, 3, 32, 32)
    noise = None if noise_dtype is None else torch.rand(3, 64, dtype=noise_dtype)

    def step():
        vit_mae.zero_grad()
        torch.manual_seed(5)
        output = vit_mae(images, noise=noise)
        output.loss.backward()
        return output, {k: p.grad for k, p in vit_mae.named_parameters() if p.grad is not None}

    before, grads_before = step()
    assert compat.patch(vit_mae) == ["vit.embeddings.random_masking"]
    after, grads = step()
    assert torch.equal(after.mask, before.mask)
    assert before.mask.sum(1).tolist() == [45.0] * 3
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads, grads_before, rtol=1e-4, atol=1e-5)
    vit_mae.config.mask_ratio = 0.5
    assert vit_mae(images, noise=noise).mask.sum(1).tolist() == [32.0] * 3
    for model in (copy.deepcopy(vit_mae), pickle.loads(pickle.dumps(vit_mae))):
        model.config.mask_ratio = 0.25  # its own, not the original's
        assert model(images, noise=noise).mask.sum(1).tolist() == [16.0] * 3
        assert vit_mae(images, noise=noise).mask.sum(1).tolist() == [32.0] * 3
        assert compat.patch(model) == ["vit.embeddings.random_masking"]
    vit_mae.config.mask_ratio = 0.7
    compat.unpatch(vit_mae)
    assert torch.equal(step()[0].logits, before.logits)


def test_hf_noise_that_float32_cannot_tell_apart(vit_mae):
    noise = 0.5 + torch.randperm(64)[None].double() * 1e-12
    x = torch.randn(1, 64, 3)
    theirs = vit_mae.vit.embeddings.random_masking(x, noise)
    ours = compat.hf_random_masking(x, noise, mask_ratio=0.7)
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(compat.hf_random_masking(x, noise)[1].sum(1), torch.tensor([48.0]))


def test_hf_noise_on_another_device():
    ours = compat.hf_random_masking(torch.empty(2, 8, 3, device="meta"), torch.rand(2, 8))
    assert [t.device.type for t in ours] == ["meta"] * 3 and ours[0].shape == (2, 2, 3)


def test_patched_vit_mae_compiles(vit_mae):
    compat.patch(vit_mae)
    images, noise = torch.randn(1, 3, 32, 32), torch.rand(1, 64)
    compiled = torch.compile(vit_mae.vit.embeddings, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, noise), vit_mae.vit.embeddings(images, noise))


# timm


@pytest.mark.parametrize("prob", [0.0, 0.25, 0.5, 0.99])
@pytest.mark.parametrize(("tokens", "prefix"), [(1, 0), (17, 1), (17, 0), (20, 3), (3, 3)])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_timm_patch_dropout_forward(timm_dropout, tokens, prefix, prob, ordered, training):
    x = torch.randn(3, tokens, 4, requires_grad=True)
    weight = torch.randn(3, tokens, 4)  # follows each token, in whatever order they come
    results = []
    for function in (timm_dropout.patch_dropout_forward, compat.timm_patch_dropout_forward):
        torch.manual_seed(2)
        kept, keep = function(x, prob, prefix, ordered, training)
        if keep is None:
            assert kept is x and not (training and prob)
            results.append(None)
            continue
        patches, order = kept[:, prefix:], keep.argsort(dim=1)
        ids = torch.cat([torch.arange(prefix).expand(3, -1), keep + prefix], 1)
        (grad,) = torch.autograd.grad((kept * weight.take_along_dim(ids[:, :, None], 1)).sum(), x)
        results.append(
            (
                kept[:, :prefix],
                patches.take_along_dim(order[:, :, None], 1),
                keep.sort(dim=1).values,
                grad,
            )
        )
        if function is compat.timm_patch_dropout_forward or ordered:
            assert torch.equal(keep, keep.sort(dim=1).values)
    if results[0] is None:
        assert results[1] is None
    else:
        for theirs, ours in zip(*results, strict=True):
            assert torch.equal(ours, theirs) and ours.dtype is theirs.dtype


@pytest.mark.parametrize("name", ["PatchDropout", "PatchDropoutWithIndices"])
def test_patched_timm_model_computes_the_same(timm_dropout, name):
    torch.manual_seed(0)
    drop = getattr(timm_dropout, name)(0.5, num_prefix_tokens=1)
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model, x = nn.ModuleDict({"patch_drop": drop, "block": block}), torch.randn(4, 33, 16)

    def step(model):
        torch.manual_seed(4)
        kept = model["patch_drop"](x)
        if name == "PatchDropoutWithIndices":
            kept, keep = kept
            assert keep is None or torch.equal(kept[:, 1], x[torch.arange(4), 1 + keep[:, 0]])
        out = model["block"](kept)
        return kept.shape, torch.cat([out[:, 0], out.mean(1)], 1)  # class token, pooled patches

    before = step(model)
    assert compat.patch(model) == ["patch_drop.forward"] == compat.patch(model)
    shape, after = step(model)
    assert shape == before[0] == (4, 17, 16)
    torch.testing.assert_close(after, before[1], rtol=1e-5, atol=1e-5)
    compiled = torch.compile(model["patch_drop"], backend="eager", fullgraph=True)
    compiled(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(step(other)[1], after)
        other["patch_drop"].prob = 0.25  # its own, not the original's
        assert step(other)[0] == (4, 25, 16)
        assert step(model)[0] == shape
        assert step(other.eval())[0] == (4, 33, 16)
    compat.unpatch(model)
    assert torch.equal(step(model)[1], before[1])


def test_patch_respects_what_others_patched(timm_dropout):
    model = nn.Sequential(timm_dropout.PatchDropout())
    hooked = model[0].forward = lambda x: x
    with pytest.raises(ValueError, match="model"):
        compat.patch(model)
    compat.unpatch(model)
    assert model[0].forward is hooked


def test_one_class_for_both_with_a_flag(timm_dropout):
    class PatchDropout(timm_dropout.PatchDropout):  # as timm had it
        def __init__(self, return_indices):
            super().__init__()
            self.return_indices = return_indices

        def forward(self, x):
            raise AssertionError("not replaced")

    for flag in (False, True):
        module = PatchDropout(flag)
        compat.patch(module)
        result = module(torch.randn(2, 9, 3))
        assert isinstance(result, tuple) is flag


# lightly


@pytest.mark.parametrize("mask_class_token", [True, False])
@pytest.mark.parametrize("mask_ratio", [0.0, 0.6, 0.75, 1.0])
@pytest.mark.parametrize("size", [(2, 0), (2, 1), (0, 9), (3, 197)])
def test_lightly_random_token_mask(lightly_utils, size, mask_ratio, mask_class_token):
    results = []
    for function in (lightly_utils.random_token_mask, compat.lightly_random_token_mask):
        torch.manual_seed(7)
        results.append(function(size, mask_ratio, mask_class_token, device="cpu"))
    for theirs, ours in zip(*results, strict=True):
        assert ours.dtype is theirs.dtype
        assert torch.equal(ours, theirs.sort(dim=1).values)


def test_lightly_defaults_and_patch(lightly_utils):
    theirs = lightly_utils.random_token_mask
    assert (
        inspect.signature(theirs).parameters.keys()
        == inspect.signature(compat.lightly_random_token_mask).parameters.keys()
    )
    names = [f"{lightly_utils.__name__}.random_token_mask"]
    torch.manual_seed(0)
    before = theirs(size=(4, 50))
    assert compat.patch(lightly_utils) == names == compat.patch(lightly_utils)
    assert lightly_utils.random_token_mask is compat.lightly_random_token_mask
    torch.manual_seed(0)
    after = lightly_utils.random_token_mask(size=(4, 50))
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a, b.sort(dim=1).values)
    # what lightly does with them: the same tokens, each in the same place again
    tokens = torch.randn(4, 50, 3)
    for keep, mask in (before, after):
        rebuilt = lightly_utils.set_at_index(tokens, mask, lightly_utils.get_at_index(tokens, mask))
        assert torch.equal(rebuilt, tokens)
        assert torch.equal(torch.cat([keep, mask], 1).sort().values, torch.arange(50).expand(4, -1))
    compat.unpatch(lightly_utils)
    assert lightly_utils.random_token_mask is theirs


@pytest.mark.parametrize(
    ("function", "arguments", "error", "name"),
    [
        ("mae_random_masking", (torch.zeros(3), 0.5), ValueError, "x"),
        ("mae_random_masking", (torch.zeros(1, 3, 2), 1.5), ValueError, "mask_ratio"),
        ("mae_random_masking", (None, 0.5), TypeError, "x"),
        ("hf_random_masking", (torch.zeros(3),), ValueError, "sequence"),
        ("hf_random_masking", (torch.zeros(1, 3, 2), torch.rand(1, 4)), ValueError, "noise"),
        (
            "hf_random_masking",
            (torch.zeros(1, 3, 2), torch.zeros(1, 3, dtype=torch.int64)),
            TypeError,
            "noise",
        ),
        ("timm_patch_dropout_forward", (torch.zeros(3), 0.5, 1, False, True), ValueError, "x"),
        (
            "timm_patch_dropout_forward",
            (torch.zeros(1, 3, 2), -0.5, 1, False, True),
            ValueError,
            "prob",
        ),
        (
            "timm_patch_dropout_forward",
            (torch.zeros(1, 3, 2), 0.5, -1, False, True),
            ValueError,
            "num_prefix_tokens",
        ),
        ("lightly_random_token_mask", (5,), TypeError, "size"),
        ("lightly_random_token_mask", ((2, -1),), ValueError, "size"),
        ("lightly_random_token_mask", ((2, 3.0),), TypeError, "size"),
        ("lightly_random_token_mask", ((2, 3), 2.0), ValueError, "mask_ratio"),
        ("lightly_random_token_mask", ((2, 3), 0.6, False, "nope"), ValueError, "device"),
        ("lightly_random_token_mask", ((2, 3), 0.6, False, 3.5), TypeError, "device"),
    ],
)
def test_wrong_arguments(function, arguments, error, name):
    with pytest.raises(error, match=f"^{name}: "):
        getattr(compat, function)(*arguments)


def test_importing_needs_none_of_the_peers():
    import subprocess

    code = (
        "import sys, sma_fast.compat; "
        "print([m for m in ('transformers', 'timm', 'lightly', 'torchvision') if m in sys.modules])"
    )
    root = Path(sma_fast.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr
