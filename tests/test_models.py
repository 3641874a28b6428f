"""SMA's pretraining model: its loss, shapes, padding, and ways of running."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model_inputs import (
    ENCODERS,
    KINDS,
    SELF,
    assert_close,
    build,
    config,
    lengths,
    random_mask,
    rng,
    sample,
)

from sma_fast.masking.sma import SMAMasking
from sma_fast.models import SMAConfig, SMAForPrediction, SMAForPretraining
from sma_fast.models.sma import SMAOutput

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
    card = (tmp_path / "README.md").read_text()
    assert "library_name: sma_fast" in card and "pushed" not in card
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
