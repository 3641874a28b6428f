import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden import RECORDED, golden, load_recorded, recorded_draws

import sma_fast
from sma_fast.masking.sma import SMAMasking, given_selection
from sma_fast.models import SMAConfig, SMAForPrediction, SMAForPretraining, load_published
from sma_fast.models.published import _our_name
from sma_fast.models.sma import SMAOutput

KINDS = ("discrete", "continuous")
SELF = {"encoder_type": "self_attention", "embedded_channels": 16, "decoder_heads": 4}
ENCODERS = {"cross": {}, "self": SELF}


def config(kind: str = "discrete", **changes) -> SMAConfig:
    sizes = {
        "input_type": kind,
        "num_discrete_tokens": 20,
        "input_channels": 3,
        "max_position_embeddings": 32,
        "embedded_channels": 12,
        "num_latents": 6,
        "latent_channels": 16,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 2,
        "qk_channels": 8,
        "decoder_heads": 3,
        "initializer_range": 0.3,
        "pe_initializer_range": 0.3,
        "masking": SMAMasking(mask_ratio=0.4, num_queries=2),
    }
    return SMAConfig(**(sizes | changes))


def build(kind: str = "discrete", **changes) -> SMAForPretraining:
    torch.manual_seed(0)
    return SMAForPretraining(config(kind, **changes))


def sample(kind: str, batch: int = 4, tokens: int = 20) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    if kind == "discrete":
        return torch.randint(20, (batch, tokens), generator=rng)
    return torch.randn(batch, tokens, 3, generator=rng)


def lengths(*valid: int, tokens: int = 20) -> torch.Tensor:
    return (torch.arange(tokens) < torch.tensor(valid)[:, None]).long()


def random_mask(batch: int = 4, tokens: int = 20) -> torch.Tensor:
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(2)) < 0.4


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, scale: float | None = None) -> None:
    """1e-5 of the largest element expected."""
    scale = expected.abs().max().item() if scale is None else scale
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(scale, 1e-30))


# Published behaviour


def published(data: dict) -> tuple[dict, dict]:
    meta = json.loads(str(data["meta"]))
    json_config = meta["config"] | {
        "teacher_args": {"reconstruction_decoder_args": meta["decoder"]},
        "cross_train_noising_args": [["masking", meta["masking"]]],
    }
    weights = {
        key.removeprefix("weight/"): torch.from_numpy(value)
        for key, value in data.items()
        if key.startswith("weight/")
    }
    return json_config, weights


@pytest.mark.parametrize("name", RECORDED)
def test_golden_loss_hidden_state_and_gradients(name: str) -> None:
    data = golden(name)
    model = load_published(*published(data))
    mask = torch.from_numpy(data["loss_mask"]).bool()
    out = model(
        torch.from_numpy(data["inputs"]), torch.from_numpy(data["attention_mask"]), mask=mask
    )
    assert torch.equal(out.mask, mask)
    assert out.loss.item() == pytest.approx(float(data["loss"]), rel=1e-5)
    hidden, expected = out.last_hidden_state, torch.from_numpy(data["last_hidden_state"])
    if model.encoder.latents is None:  # rows of visible tokens, and something else behind them
        number = torch.from_numpy(data["attention_mask_out"]).sum(dim=1)
        rows = torch.arange(expected.shape[1]) < number[:, None]
        assert number.max() == expected.shape[1]
        assert not hidden[:, expected.shape[1] :].any()
        hidden, expected = hidden[:, : expected.shape[1]][rows], expected[rows]
    assert_close(hidden, expected)

    out.loss.backward()
    parameters = dict(model.named_parameters())
    recorded = {k.removeprefix("grad/"): v for k, v in data.items() if k.startswith("grad/")}
    assert {_our_name(key) for key in recorded} == parameters.keys()
    for key, value in recorded.items():
        # a key's bias shifts all logits of a query alike: its gradient is rounding around 0
        scale = 1e-2 if _our_name(key).endswith("key.bias") else None
        assert_close(parameters[_our_name(key)].grad, torch.from_numpy(value), scale)


class RecordedMasking(SMAMasking):
    """Draws what was recorded instead of drawing."""

    def draw_tokens(self, *_) -> torch.Tensor:
        return self.draws["query_index"]

    def select(self, scores: torch.Tensor, **options) -> sma_fast.TokenSelection:
        options |= {"noise": self.draws["noise"], "generator": None}
        return super().select(scores, **options)


@pytest.mark.parametrize("name", RECORDED)
def test_golden_mask_from_recorded_draws(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = load_published(*published(golden(name))), load_recorded(name)
    meta = json.loads(str(data["meta"]))
    draws = recorded_draws(data, meta["masking"], meta["noise_scale"])
    index = draws["query_index"]
    masking = RecordedMasking(**dataclasses.asdict(model.config.masking))
    object.__setattr__(masking, "draws", draws)
    # the recorded noise scale is the amount of noise where the cosine stands at it
    progress = math.acos(2 * meta["noise_scale"] - 1) / math.pi if meta["noise_scale"] else 1.0
    if model.encoder.latents is None:
        if draws["head_index"] is not None:
            heads = draws["head_index"].gather(1, index.clamp(min=0))
            monkeypatch.setattr(torch, "randint", lambda *_, **__: heads)
        mask = model.encoder(
            data["inputs"], data["attention_mask"], masking, progress=progress
        ).selection.mask
    else:
        assert masking.count_queries(*data["attn_logits"].shape[:1:-1]) == index.shape[1]
        encoder = model.encoder
        with torch.no_grad():
            key = encoder.first.split(encoder.first.key(encoder.embedding(data["inputs"])))
            query = encoder.first.split(encoder.latent_queries())
        padding = data["attention_mask"] == 0
        scores = sma_fast.attention_scores(query, key, query_index=index, key_padding_mask=padding)
        mask = masking.select(scores, key_padding_mask=padding, progress=progress).mask
        if not meta["noise_scale"]:  # and in one call
            guided = sma_fast.self_guided_masking(
                query,
                key,
                mask_ratio=masking.mask_ratio,
                query_index=index,
                key_padding_mask=padding,
            )
            assert torch.equal(guided.selection.mask, mask)
    assert torch.equal(mask, data["loss_mask"].bool())


def test_load_published_reads_the_masker() -> None:
    masking = load_published(*published(golden("protein_cross_wide"))).config.masking
    assert masking == SMAMasking(mask_ratio=0.15, num_per_query=1, head_reduce="mean")


def test_load_published_without_duplicates_and_from_duplicates_only() -> None:
    json_config, weights = published(golden("language_cross"))
    expected = load_published(json_config, weights).state_dict()
    aside = ("teacher.student_model.", "teacher.encoder_input_preprocesor.")
    once = {k: v for k, v in weights.items() if not k.startswith(aside)}
    copies = {k: v for k, v in weights.items() if not k.startswith("perceiver.")}
    for fewer in (once, copies):
        assert len(fewer) < len(weights)
        loaded = load_published(json_config, fewer).state_dict()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("perceiver.encoding_latents.latents"), "missing: encoder.latents"),
        (lambda w: w.update({"perceiver.foreign": torch.ones(1)}), "unknown: perceiver.foreign"),
        (
            lambda w: w.update(
                {"teacher.reconstruction_decoder.pre_layernorm.bias": torch.ones(3)}
            ),
            "of another shape: decoder.context_norm.bias",
        ),
        (
            lambda w: w.update({"teacher.encoder_input_preprocesor.layernorm.bias": torch.ones(3)}),
            "differing duplicates: teacher.encoder_input_preprocesor.layernorm.bias",
        ),
    ],
)
def test_load_published_refuses_foreign_checkpoints(change, message: str) -> None:
    json_config, weights = published(golden("image_cross"))
    weights = {k: v for k, v in weights.items() if not k.startswith("teacher.student_model.")}
    change(weights)
    with pytest.raises(ValueError, match=message):
        load_published(json_config, weights)


def test_load_published_refuses_settings_it_does_not_have() -> None:
    json_config, weights = published(golden("image_cross"))
    with pytest.raises(ValueError, match="hidden_act: got 'relu'"):
        load_published(json_config | {"hidden_act": "relu"}, weights)


# The cheap way gives what the plain formula gives


def plain_forward(
    model: SMAForPretraining, inputs: torch.Tensor, valid: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and hidden state the expensive way: all keys with a bias, all positions decoded."""

    def attend(layer, x, normed, keys_values, bias=0.0):
        query, key, value = (
            layer.split(y)
            for y in (layer.query(normed), layer.key(keys_values), layer.value(keys_values))
        )
        logits = query @ key.transpose(2, 3) / math.sqrt(query.shape[3]) + bias
        context = (logits.softmax(dim=3) @ value).transpose(1, 2).flatten(2)
        x = x + layer.output(context)
        return x + layer.mlp(layer.mlp_norm(x))

    encoder, decoder = model.encoder, model.decoder
    embeddings = encoder.embedding(inputs)
    hidden = torch.zeros(mask.shape).masked_fill(mask | (valid == 0), float("-inf"))
    hidden = hidden[:, None, None, :]
    tokens = encoder.latents is None
    x = embeddings if tokens else encoder.latents.expand(len(inputs), -1, -1)
    x = attend(encoder.first, x, encoder.first.query_norm(x), embeddings, hidden)
    later = hidden if tokens else 0.0  # tokens stay where they are, hidden ones among them
    for _ in range(model.config.num_blocks):
        for layer in encoder.layers:
            normed = layer.query_norm(x)
            x = attend(layer, x, normed, normed, later)
    queries = decoder.queries.weight[: inputs.shape[1]].expand(len(inputs), -1, -1)
    layer = decoder.layer
    logits = attend(layer, queries, layer.query_norm(queries), decoder.context_norm(x), later)
    logits = decoder.output(decoder.norm(logits))
    counted = mask & (valid == 1)
    if model.config.input_type == "discrete":
        return F.cross_entropy(logits[counted], inputs[counted]), x
    return F.mse_loss(logits[counted], inputs[counted]), x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share_decoder_queries": False, "decoder_channels": 15, "num_blocks": 2},
        {"share_embedding_weights": False, "dense_use_bias": False, "v_channels": 8},
        SELF,
        SELF | {"num_blocks": 2, "share_decoder_queries": False, "decoder_channels": 20},
    ],
)
def test_loss_equals_the_plain_formula(kind: str, changes: dict) -> None:
    model, inputs = build(kind, **changes).double(), sample(kind)
    inputs = inputs if kind == "discrete" else inputs.double()
    valid, mask = lengths(20, 13, 7, 2), random_mask()
    mask[3] = torch.tensor([True] + [False] * 19)
    loss, hidden = plain_forward(model, inputs, valid, mask)
    out = model(inputs, valid, mask=mask)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=0)
    hidden_again = in_place(model, out, valid, hidden)
    torch.testing.assert_close(hidden_again, hidden, rtol=1e-9, atol=1e-9)
    plain = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    ours = torch.autograd.grad(out.loss, list(model.parameters()), allow_unused=True)
    for expected, actual in zip(plain, ours, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


def in_place(
    model: SMAForPretraining, out: SMAOutput, valid: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """The encoder's output where plain_forward has it: visible tokens among all, as they stood."""
    if model.encoder.latents is not None:
        return out.last_hidden_state
    back = hidden.clone()  # hidden tokens have an output there, which nothing uses
    visible = ~out.mask & (valid == 1)
    for row, shown in enumerate(visible):
        back[row, shown] = out.last_hidden_state[row, : int(shown.sum())]
        assert not out.last_hidden_state[row, int(shown.sum()) :].any()
    return back


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("padding", ["none", "right", "left", "scattered"])
@pytest.mark.parametrize("mask_self", [False, True])
def test_guided_loss_is_the_loss_of_the_mask_it_returns(
    kind: str, encoder: str, padding: str, mask_self: bool
) -> None:
    masking = SMAMasking(mask_ratio=0.4, num_per_query=4, mask_self=mask_self)
    model, inputs = build(kind, **ENCODERS[encoder], masking=masking), sample(kind)
    valid = None if padding == "none" else lengths(20, 13, 7, 2)
    if padding == "left":
        valid = valid.flip(1)
    if padding == "scattered":
        valid = valid[:, torch.randperm(20, generator=rng())]
    out = model(inputs, valid, generator=rng())
    valid = lengths(20, 20, 20, 20) if valid is None else valid
    loss, hidden = plain_forward(model, inputs, valid, out.mask)
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=0)
    assert_close(in_place(model, out, valid, hidden).detach(), hidden.detach())


# Shapes, masks and padding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", ["guided", "random"])
def test_shapes(kind: str, mask: str) -> None:
    model = build(kind, masking=SMAMasking(mask_ratio=0.4, num_queries=2, mask=mask))
    out = model(sample(kind))
    assert out.loss.shape == () and out.loss.dtype == torch.float32 and out.loss > 0
    assert out.last_hidden_state.shape == (4, 6, 16)
    assert out.mask.shape == (4, 20) and out.mask.dtype == torch.bool
    assert out.mask.sum(dim=1).tolist() == [8] * 4
    assert torch.equal(out.ids_masked, out.mask.nonzero()[:, 1].view(4, 8))
    assert out.logits.shape == (4, 8, 20 if kind == "discrete" else 3)
    assert (out.scores is None) == (mask == "random")
    if mask == "guided":  # two queries' attention, averaged over heads
        torch.testing.assert_close(out.scores.sum(dim=1), torch.full((4,), 2.0))


@pytest.mark.parametrize("kind", KINDS)
def test_masked_values_do_not_reach_the_encoder(kind: str) -> None:
    model, inputs, mask = build(kind), sample(kind), random_mask()
    before = model(inputs, mask=mask)
    assert torch.equal(before.mask, mask)
    changed = inputs.clone()
    changed[mask] = (inputs[mask] + 1) % 20 if kind == "discrete" else 5.0
    after = model(changed, mask=mask)
    assert torch.equal(after.last_hidden_state, before.last_hidden_state)
    assert torch.equal(after.logits, before.logits)
    assert after.loss != before.loss  # the targets did change
    seen = inputs.clone()
    seen[~mask] = (inputs[~mask] + 1) % 20 if kind == "discrete" else 5.0
    assert not torch.allclose(model(seen, mask=mask).last_hidden_state, before.last_hidden_state)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: str) -> None:
    model, inputs, mask = build(kind), sample(kind), random_mask()
    short = model(inputs[:, :13], mask=mask[:, :13])
    padded = inputs.clone()
    padded[:, 13:] = 7
    valid = lengths(13, 13, 13, 13)
    long = model(padded, valid, mask=mask)
    assert torch.equal(long.mask[:, :13], short.mask) and not long.mask[:, 13:].any()
    torch.testing.assert_close(long.loss, short.loss)
    torch.testing.assert_close(long.last_hidden_state, short.last_hidden_state)
    encoded = model.encoder(padded, valid).last_hidden_state
    torch.testing.assert_close(encoded, model.encoder(inputs[:, :13]).last_hidden_state)


@pytest.mark.parametrize("mask", ["guided", "random"])
def test_ragged_rows_mask_their_own_share(mask: str) -> None:
    model = build(masking=SMAMasking(mask_ratio=0.4, num_queries=2, mask=mask))
    valid = lengths(20, 13, 7, 2)
    out = model(sample("discrete"), valid)
    assert out.mask.sum(dim=1).tolist() == [round(0.4 * n) for n in (20, 13, 7, 2)]
    assert not (out.mask & (valid == 0)).any()


def test_rows_without_anything_to_see_or_to_reconstruct() -> None:
    model, inputs = build(), sample("discrete")
    torch.nn.init.normal_(model.encoder.first.value.bias)
    mask = torch.zeros(4, 20, dtype=torch.bool)
    mask[1], mask[2, 3] = True, True
    out = model(inputs, lengths(20, 20, 20, 0), mask=mask)
    encoder = model.encoder
    blank = torch.zeros(1, 1, 12)  # what a row attends to that sees no token
    query, key, value = (
        encoder.latent_queries(),
        encoder.first.key(blank),
        encoder.first.value(blank),
    )
    expected = encoder.first(encoder.latents[None], query, key, value)
    for layer in encoder.layers:
        normed = layer.query_norm(expected)
        expected = layer(expected, *(f(normed) for f in (layer.query, layer.key, layer.value)))
    for row in (1, 3):  # everything masked, nothing but padding
        assert_close(out.last_hidden_state[row], expected[0].detach())
    assert out.loss.isfinite()
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    nothing = model(inputs, mask=torch.zeros_like(mask))
    assert nothing.loss == 0
    assert model(inputs[:0]).loss == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [True, False])
def test_every_parameter_learns(kind: str, shared: bool) -> None:
    model = build(kind, share_decoder_queries=shared)
    model(sample(kind)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith("key.bias"):  # no effect on a softmax over keys
            assert parameter.grad.abs().max() > 0, name


def test_weights_are_tied_where_the_widths_agree() -> None:
    model = build()
    assert model.decoder.output.weight is model.encoder.embedding.tokens.weight
    assert model.decoder.queries.weight is model.encoder.embedding.positions.weight
    own = build(share_decoder_queries=False, decoder_channels=15)
    assert own.decoder.output.weight.shape == (20, 15)


# Draws


@pytest.mark.parametrize("mask", ["guided", "random"])
@pytest.mark.parametrize("training", [True, False])
def test_draws_follow_the_seed(mask: str, training: bool) -> None:
    model = build(masking=SMAMasking(mask_ratio=0.4, num_queries=2, mask=mask)).train(training)
    inputs = sample("discrete", batch=16)
    masks = [model(inputs, generator=rng(seed)).mask for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    torch.manual_seed(3)
    first = model(inputs).mask
    torch.manual_seed(3)
    assert torch.equal(first, model(inputs).mask)


def test_random_masks_are_uniform() -> None:
    masking = SMAMasking(mask_ratio=0.25, mask="random")
    drawn = masking.random(torch.empty(4000, 12), generator=rng()).mask.float()
    assert drawn.sum(dim=1).unique().tolist() == [3]
    deviation = math.sqrt(0.25 * 0.75 / 4000)
    assert (drawn.mean(dim=0) - 0.25).abs().max() < 5 * deviation


@pytest.mark.parametrize(
    ("arguments", "tokens", "queries", "expected"),
    [
        ({"mask_ratio": 0.15, "num_per_query": 4}, 1024, 256, 38),
        ({"mask_ratio": 0.3, "num_per_query": 3}, 512, 512, 51),
        ({"mask_ratio": 0.15, "num_per_query": 4}, 8, 256, 1),  # rounds to 0
        ({"mask_ratio": 0.9, "num_per_query": 1}, 100, 90, 90),
        ({"mask_ratio": 0.15, "num_per_query": 4}, 0, 0, 0),
        ({"mask_ratio": 0.15, "num_queries": 5}, 1024, 256, 5),
    ],
)
def test_count_queries(arguments: dict, tokens: int, queries: int, expected: int) -> None:
    assert SMAMasking(**arguments).count_queries(tokens, queries) == expected


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"mask_ratio": 0.9, "num_per_query": 1}, "num_per_query"),
        ({"num_queries": 13}, "num_queries"),
    ],
)
def test_more_queries_than_there_are(arguments: dict, name: str) -> None:
    masking = SMAMasking(**arguments)
    with pytest.raises(ValueError, match=rf"^{name}: .* of 12 queries, allowed is"):
        masking.count_queries(100, 12)
    with pytest.raises(ValueError, match=rf"^{name}: .* of 12 queries, allowed is"):
        masking.guided(torch.zeros(1, 2, 12, 4), torch.zeros(3, 2, 100, 4))


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"mask_ratio": 1.0}, ValueError, "mask_ratio"),
        ({"mask_ratio": "half"}, TypeError, "mask_ratio"),
        ({"num_per_query": 0.5}, ValueError, "num_per_query"),
        ({"num_per_query": True}, TypeError, "num_per_query"),
        ({"num_queries": 0}, ValueError, "num_queries"),
        ({"num_queries": True}, TypeError, "num_queries"),
        ({"num_queries": 2.0}, TypeError, "num_queries"),
        ({"head_reduce": "none"}, ValueError, "head_reduce"),
        ({"mask": "attention"}, ValueError, "mask"),
    ],
)
def test_wrong_masking(arguments: dict, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{name}: .*allowed is"):
        SMAMasking(**arguments)


def test_given_selection() -> None:
    mask = torch.tensor([[True, False, True, False], [True, True, False, True]])
    padding = torch.tensor([[False, False, False, True], [False, True, False, False]])
    selection = given_selection(mask, padding)
    assert selection.mask.tolist() == [[True, False, True, False], [True, False, False, True]]
    assert selection.ids_visible.tolist() == [[1, -1, -1, -1], [2, -1, -1, -1]]
    assert selection.ids_masked.tolist() == [[0, 2, -1, -1], [0, 3, -1, -1]]


# Ways of running


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_compiles_without_graph_breaks(kind: str, encoder: str) -> None:
    model, inputs, valid = build(kind, **ENCODERS[encoder]), sample(kind), lengths(20, 13, 7, 2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for forward in (model, compiled):
        torch.manual_seed(5)
        out = forward(inputs, valid)
        gradients = torch.autograd.grad(out.loss, list(model.parameters()))
        results.append((out.mask, out.loss, *gradients))
    torch._dynamo.reset()
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_autocast() -> None:
    model, inputs, mask = build("continuous"), sample("continuous"), random_mask()
    exact = model(inputs, mask=mask).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(inputs, mask=mask)
        guided = model(inputs)
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, exact, rtol=0.05, atol=0)
    guided.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("encoder", ENCODERS)
def test_checkpointing_changes_nothing(encoder: str) -> None:
    model, inputs, mask = build(**ENCODERS[encoder]), sample("discrete"), random_mask()
    losses = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        loss = model(inputs, lengths(20, 13, 7, 2), mask=mask).loss
        losses.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for kept, computed_again in zip(*losses, strict=True):
        torch.testing.assert_close(computed_again, kept)


@pytest.mark.parametrize(
    "dropout",
    [{"attention_dropout_prob": 0.3, "hidden_dropout_prob": 0.3}, {"drop_path_prob": 0.5}],
    ids=str,
)
def test_dropout_only_in_training(dropout: dict) -> None:
    model = build(**dropout)
    inputs, mask = sample("discrete"), random_mask()
    assert model(inputs, mask=mask).loss != model(inputs, mask=mask).loss
    model.eval()
    assert model(inputs, mask=mask).loss == model(inputs, mask=mask).loss


def test_importing_the_package_leaves_models_and_training_alone() -> None:
    heavy = "{'sma_fast.models', 'sma_fast.training', 'transformers', 'sklearn', 'matplotlib'}"
    code = f"import sys, sma_fast, sma_fast.cli; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Wrong arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_type": "pictures"}, "input_type: got 'pictures', allowed is 'discrete'"),
        ({"encoder_type": "self_attention"}, "embedded_channels: got 12, allowed is latent"),
        ({"encoder_type": "mixture"}, "encoder_type: got .mixture."),
        ({"drop_path_prob": 1.0}, "drop_path_prob: got 1.0"),
        ({"problem_type": "ranking"}, "problem_type: got .ranking."),
        ({"qk_channels": 10}, "qk_channels: got 10, allowed is a multiple of"),
        ({"decoder_heads": 0}, "decoder_channels: got 12, allowed is a multiple of"),
        ({"num_latents": 0}, "num_latents: got 0"),
        ({"decoder_channels": 24}, "decoder_channels: got 24, allowed is embedded_channels"),
        ({"masking": {"mask_ratio": 1.0}}, r"mask_ratio: got 1.0, allowed is \(0, 1\)"),
        ({"masking": {"mask_ratio": 0.0}}, "mask_ratio: got 0.0"),
        ({"masking": {"num_queries": 0}}, "num_queries: got 0"),
        ({"masking": {"num_per_query": 0}}, "num_per_query: got 0"),
        ({"masking": {"head_reduce": "max"}}, "head_reduce: got 'max'"),
        ({"masking": {"mask": "block"}}, "mask: got 'block', allowed is 'guided', 'random'"),
    ],
)
def test_config_refuses(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_config_goes_through_a_dict() -> None:
    before = config("continuous")
    assert SMAConfig(**dataclasses.asdict(before)) == before


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        ("discrete", {"inputs": torch.rand(2, 20)}, ValueError, "inputs: got torch.float32"),
        ("discrete", {"inputs": torch.ones(2, 33).long()}, ValueError, "at most 32"),
        ("continuous", {"inputs": torch.rand(2, 20, 4)}, ValueError, r"allowed is \(B, N, 3\)"),
        (
            "discrete",
            {"attention_mask": torch.ones(2, 19)},
            ValueError,
            "attention_mask: got shape",
        ),
        ("discrete", {"mask": torch.ones(4, 19).bool()}, ValueError, "mask: got shape"),
        ("discrete", {"mask": torch.ones(4, 20)}, TypeError, "mask: got torch.float32"),
    ],
)
def test_forward_refuses(kind: str, arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        build(kind)(**({"inputs": sample(kind)} | arguments))


# Tokens that attend to each other


def test_self_attention_draws_from_each_rows_own_tokens() -> None:
    masking = SMAMasking(mask_ratio=0.4, num_per_query=2)
    padding = lengths(20, 13, 7, 2, 0)[:, torch.randperm(20, generator=rng())] == 0
    drawn = masking.draw_tokens(torch.empty(5, 20, 1), padding, rng())
    assert drawn.shape == (5, 4)
    for row, number in zip(drawn, (4, 3, 1, 1, 0), strict=True):  # round(n .4 / 2), at least 1
        assert (row >= 0).sum() == number
    assert not padding.gather(1, drawn.clamp(min=0))[drawn >= 0].any()
    assert (masking.draw_tokens(torch.empty(3, 20, 1)) >= 0).all()


def test_mask_self_masks_the_drawn_tokens_first() -> None:
    masking = SMAMasking(mask_ratio=0.4, num_per_query=2, mask_self=True)
    scores, drawn = torch.rand(3, 20, generator=rng()), torch.tensor([[1, 5], [3, -1], [-1, -1]])
    plain = dataclasses.replace(masking, mask_self=False).select(scores, drawn=drawn)
    selection = masking.select(scores, drawn=drawn)
    assert selection.mask[0, [1, 5]].all() and selection.mask[1, 3]
    assert torch.equal(selection.mask[2], plain.mask[2])
    assert selection.num_masked.tolist() == [8, 8, 8]


# Annealing


@pytest.mark.parametrize(
    ("anneal_by", "progress", "expected"),
    [
        ("share", 0.0, {"random_fraction": 0.9}),
        ("share", 0.125, {"random_fraction": 0.45}),
        ("share", 0.25, {}),
        ("pool", 0.0, {"pool_ratio": 0.9}),
        ("pool", 0.125, {"pool_ratio": 0.65}),
        ("pool", 1.0, {}),
    ],
)
def test_annealing(anneal_by: str, progress: float, expected: dict) -> None:
    masking = SMAMasking(
        mask_ratio=0.4,
        select_initial_ratio=0.9,
        schedule_length_ratio=0.25,
        anneal_by=anneal_by,
    )
    assert masking.annealing(progress) == pytest.approx(expected)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("anneal_by", ["share", "pool"])
def test_annealed_masks_begin_at_random_and_end_guided(encoder: str, anneal_by: str) -> None:
    masking = SMAMasking(
        mask_ratio=0.25, num_queries=1, select_initial_ratio=1.0, anneal_by=anneal_by
    )
    model = build(**ENCODERS[encoder], masking=masking)
    inputs = sample("discrete", batch=1).expand(2000, -1)
    shares = {}
    for progress in (0.0, 1.0):
        model.progress = progress
        with torch.no_grad():
            shares[progress] = model(inputs, generator=rng()).mask.float().mean(dim=0)
    deviation = math.sqrt(0.25 * 0.75 / 2000)
    assert (shares[0.0] - 0.25).abs().max() < 5 * deviation
    assert (shares[1.0] - 0.25).abs().max() > 20 * deviation


# Prediction

PROBLEMS = {
    "single_label_classification": torch.tensor([0, 2, 1, 1]),
    "multi_label_classification": torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 0]]),
    "regression": torch.tensor([[0.5, -1, 2], [0, 0.1, 1], [1, 3, 1], [0, 1, -4]]),
}


def build_prediction(problem: str, encoder: str = "cross", **changes) -> SMAForPrediction:
    torch.manual_seed(0)
    changes |= ENCODERS[encoder]
    return SMAForPrediction(config(problem_type=problem, num_labels=3, **changes))


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_prediction(problem: str, encoder: str) -> None:
    model, labels = build_prediction(problem, encoder), PROBLEMS[problem]
    inputs, valid = sample("discrete"), lengths(20, 13, 7, 2)
    out = model(inputs, valid, labels)
    assert out.logits.shape == (4, 3)
    expected = {
        "single_label_classification": F.cross_entropy,
        "multi_label_classification": F.binary_cross_entropy_with_logits,
        "regression": F.mse_loss,
    }[problem](out.logits, labels)
    torch.testing.assert_close(out.loss, expected)
    assert model(inputs, valid).loss is None
    for row, length in enumerate((20, 13, 7, 2)):  # padding changes nothing
        alone = model(inputs[row : row + 1, :length]).logits
        torch.testing.assert_close(alone, out.logits[row : row + 1], rtol=1e-4, atol=1e-5)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_unknown_labels_are_left_out(problem: str) -> None:
    model, labels = build_prediction(problem), PROBLEMS[problem].clone()
    labels[0], labels[2, 1] = math.nan, math.nan
    out = model(sample("discrete"), labels=labels)
    known = ~labels.isnan()
    one = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
    torch.testing.assert_close(out.loss, one(out.logits[known], labels[known]))
    assert model(sample("discrete"), labels=torch.full((4, 3), math.nan)).loss == 0


def test_one_regression_label_may_be_flat() -> None:
    torch.manual_seed(0)
    model = SMAForPrediction(config(problem_type="regression", num_labels=1))
    labels = torch.randn(4)
    flat, column = (model(sample("discrete"), labels=y).loss for y in (labels, labels[:, None]))
    assert flat == column


@pytest.mark.parametrize("encoder", ENCODERS)
def test_prediction_from_pretraining(encoder: str) -> None:
    pretrained = build(**ENCODERS[encoder])
    model = SMAForPrediction.from_pretraining(pretrained, num_labels=5, hidden_dropout_prob=0.1)
    assert model.config.num_labels == 5 and pretrained.config.num_labels == 2
    inputs = sample("discrete")
    model.eval()
    assert torch.equal(
        model(inputs).last_hidden_state, pretrained.eval().encoder(inputs).last_hidden_state
    )
    with pytest.raises(TypeError, match="labels_number"):
        SMAForPrediction.from_pretraining(pretrained, labels_number=5)
    with pytest.raises(ValueError, match="do not fit the pretrained encoder"):
        SMAForPrediction.from_pretraining(pretrained, max_position_embeddings=99)


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        ("single_label_classification", torch.zeros(3)),
        ("single_label_classification", torch.zeros(4, 3)),
        ("multi_label_classification", torch.zeros(4)),
        ("regression", torch.zeros(4, 2)),
    ],
)
def test_prediction_refuses_labels(problem: str, labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"labels: got shape"):
        build_prediction(problem)(sample("discrete"), labels=labels)


# Saved and loaded


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("shared", [True, False])
def test_saved_and_loaded_again(encoder: str, shared: bool, tmp_path: Path) -> None:
    model = build(**ENCODERS[encoder], share_decoder_queries=shared)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    loaded = SMAForPretraining.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert (loaded.decoder.queries is loaded.encoder.embedding.positions) == shared
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())

    prediction = SMAForPrediction.from_pretraining(model, num_labels=7)
    prediction.save_pretrained(tmp_path / "prediction")
    again = SMAForPrediction.from_pretrained(tmp_path / "prediction")
    assert again.config == prediction.config
    inputs = sample("discrete")
    assert torch.equal(again.eval()(inputs).logits, prediction.eval()(inputs).logits)


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_self_attends_per_block", -1),
        ("self_attention_widening_factor", 0),
        ("decoder_widening_factor", -2),
        ("initializer_range", -1.0),
    ],
)
def test_config_fields_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}: got {value}, allowed is at least"):
        SMAConfig(**{field: value})


@pytest.mark.parametrize("bad", [-1, 20])
def test_ids_and_classes_out_of_range(bad: int) -> None:
    sizes = dict.fromkeys(("embedded_channels", "latent_channels", "decoder_channels"), 8)
    heads = dict.fromkeys(("num_self_attention_heads", "num_cross_attention_heads"), 2)
    config = SMAConfig(
        **{**sizes, **heads, "decoder_heads": 2, "num_latents": 4, "num_labels": 3},
        **{"num_discrete_tokens": 20, "num_self_attends_per_block": 1},
    )
    model = SMAForPrediction(config)
    inputs = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="labels: holds"):
        model(inputs, labels=torch.tensor([0, bad]))
    with pytest.raises(TypeError, match="labels: got torch.float32, allowed is integers"):
        model(inputs, labels=torch.tensor([0.0, 1.2]))
    inputs[1, 3] = bad
    with pytest.raises(ValueError, match="inputs: holds .*, allowed is 0 to 19"):
        model(inputs)


def test_short_rows_draw_all_they_have() -> None:
    masking = SMAMasking(num_queries=6)
    padding = torch.arange(8) >= torch.tensor([[8], [3]])
    drawn = masking.draw_tokens(torch.zeros(2, 8, 1), padding)
    assert (drawn >= 0).sum(1).tolist() == [6, 3] and drawn[1, :3].tolist() == [0, 1, 2]
    assert masking.draw_tokens(torch.zeros(2, 4, 1)).tolist() == [[0, 1, 2, 3]] * 2
