"""The SMA authors' masking class: as published, and where the published one fails."""

import copy
import inspect
import json

import numpy as np
import pytest
import torch
from golden import RECORDED, load_recorded, recorded_draws
from hypothesis import given, settings
from hypothesis import strategies as st

from sma_fast.compat import RandomlySelectedCrossAttentionMasking as Masking


@pytest.mark.parametrize("name", RECORDED)
def test_masks_as_published(backend, name):
    data = load_recorded(name)
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


@pytest.mark.parametrize("name", RECORDED)
def test_counts_as_published_with_own_draws(name):
    data = load_recorded(name)
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
