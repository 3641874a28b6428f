"""MAE for pictures: masks given and drawn, features, and weights shared with transformers."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peers import without

from sma_fast import ops
from sma_fast.models import MAEConfig, MAEForPretraining, SMAForPretraining, hub
from sma_fast.models.vit_layers import patchify, sincos_positions, unpatchify

try:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
except ImportError as error:
    MISSING = str(error)
else:
    MISSING = ""

N = 16
SIZES = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}


def build(**changes) -> MAEForPretraining:
    torch.manual_seed(0)
    model = MAEForPretraining(MAEConfig(**(SIZES | changes)))
    with torch.no_grad():  # biases that matter
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(batch: int = 3, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, 16, 16, generator=rng(1))


def masks(*numbers: int) -> torch.Tensor:
    scores = torch.rand(len(numbers), N, generator=rng(2))
    return ops.select_tokens(scores, num_masked=torch.tensor(numbers)).mask


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# The model, against the plain formula


def plain_block(block, x: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
    query, key, value = (block.split(y) for y in block.qkv(block.norm1(x)).chunk(3, dim=2))
    logits = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
    if hidden is not None:
        logits = logits.masked_fill(hidden[:, None, None, :], float("-inf"))
    x = x + block.output((logits.softmax(3) @ value).transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


def plain_forward(
    model: MAEForPretraining, pixels: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and reconstruction the expensive way: hidden patches stay, nobody attends to them."""
    encoder, decoder, size = model.encoder, model.decoder, model.config.patch_size
    patches = F.unfold(pixels, size, stride=size).unflatten(1, (-1, size * size))
    patches = patches.permute(0, 3, 2, 1).flatten(2)  # channels last within a patch
    x = encoder.patches(patches) + encoder.positions[1:]
    first = (encoder.class_token + encoder.positions[0]).expand(len(x), 1, -1)
    x, hidden = torch.cat([first, x], 1), F.pad(mask, (1, 0))
    for block in encoder.layers:
        x = plain_block(block, x, hidden)
    x = decoder.embed(encoder.norm(x))
    x = torch.where(hidden[:, :, None], decoder.mask_token, x) + decoder.positions
    for block in decoder.layers:
        x = plain_block(block, x)
    output = decoder.output(decoder.norm(x))[:, 1:]
    if model.config.norm_pix_loss:
        patches = (patches - patches.mean(2, keepdim=True)) / patches.var(2, keepdim=True).sqrt()
    return (output - patches).square().mean(2)[mask].mean(), output


@pytest.mark.parametrize("numbers", [(12, 12, 12), (3, 15, 1)], ids=["equal", "ragged"])
@pytest.mark.parametrize("changes", [{}, {"norm_pix_loss": True, "qkv_bias": False}], ids=str)
def test_a_given_mask_gives_the_plain_formulas_loss(numbers: tuple, changes: dict) -> None:
    model, pixels, mask = build(**changes), pictures(), masks(*numbers)
    loss, output = plain_forward(model, pixels, mask)
    scores = torch.rand(3, N, generator=rng(2))
    chosen = ops.select_tokens(scores, num_masked=torch.tensor(numbers), max_masked=max(numbers))
    for given in (mask, chosen):
        out = model(pixels, given)
        torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-6)
        assert_close(out.pixels, output)
        assert torch.equal(out.mask, mask) and out.patch_loss.shape == (3, N)
        for row, number in enumerate(numbers):
            assert out.ids_masked[row, :number].tolist() == mask[row].nonzero()[:, 0].tolist()
            assert (out.ids_masked[row, number:] == -1).all()
    plain = torch.autograd.grad(loss, list(model.parameters()))
    ours = torch.autograd.grad(out.loss, list(model.parameters()))
    for expected, actual in zip(plain, ours, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    model, pixels, mask = build(), pictures(), masks(3, 15, 1)
    together = model(pixels, mask)
    for row in range(3):
        alone = model(pixels[row : row + 1], mask[row : row + 1])
        assert alone.ids_restore.max() == N - 1  # no wider than it must be
        assert_close(alone.pixels, together.pixels[row : row + 1])


def test_masked_pixels_do_not_reach_the_reconstruction() -> None:
    model, pixels, mask = build(), pictures(), masks(12, 12, 12)
    before = model(pixels, mask)
    patches = patchify(pixels, 4)
    patches[mask] = 7.0
    after = model(unpatchify(patches, 4), mask)
    assert torch.equal(after.pixels, before.pixels) and after.loss != before.loss


def test_random_masks() -> None:
    model, pixels = build(mask_ratio=0.7), pictures()
    noise = torch.rand(3, N, generator=rng())
    out = model(pixels, noise=noise)
    assert out.mask.sum(1).tolist() == [N - int(N * 0.3)] * 3
    lowest = noise.argsort(1)[:, : int(N * 0.3)]
    assert not out.mask.gather(1, lowest).any()
    assert torch.equal(model(pixels, noise=noise.double()).mask, out.mask)
    assert torch.equal(model(pixels, out.mask).pixels, out.pixels)
    drawn = [model(pixels, generator=rng(seed)).mask for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert model(pixels[:0]).loss == 0 and model(pixels[:0], out.mask[:0]).loss == 0
    assert model.num_targets(pixels) == out.mask.sum() == model.num_targets(pixels, out.mask)


def test_every_parameter_learns() -> None:
    model = build()
    model(pictures(), generator=rng()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_initial_weights_are_maes() -> None:
    torch.manual_seed(0)
    model = MAEForPretraining(MAEConfig.preset("mae-32"))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.95 * bound < parameter.abs().max() <= bound, name
        elif name.endswith("token"):
            assert 0.015 < parameter.std() < 0.025, name
        else:
            expected = float("norm" in name and name.endswith("weight"))
            assert (parameter == expected).all(), name


def test_positions() -> None:
    positions = sincos_positions(3, 8)
    assert positions.shape == (10, 8) and not positions[0].any()
    row, column = 2, 1
    expected = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in (1, 0.01)]
    torch.testing.assert_close(positions[1 + 3 * row + column], torch.tensor(expected))


def test_patches_go_back_to_pictures() -> None:
    pixels = pictures(channels=2)
    patches = patchify(pixels, 4)
    assert torch.equal(patches[0, 5], pixels[0, :, 4:8, 4:8].permute(1, 2, 0).flatten())
    assert torch.equal(unpatchify(patches, 4), pixels)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_pictures_of_a_reconstruction(norm_pix_loss: bool) -> None:
    model, pixels = build(norm_pix_loss=norm_pix_loss), pictures()
    out = model(pixels, generator=rng())
    perfect = out._replace(pixels=model.targets(model.patchify(pixels)))
    assert_close(model.pictures(pixels, perfect), pixels)
    made = patchify(model.pictures(pixels, out), 4)
    assert torch.equal(made[~out.mask], patchify(pixels, 4)[~out.mask])
    assert not torch.isclose(made, patchify(pixels, 4)).all(2)[out.mask].any()


# Features of whole pictures


@pytest.mark.parametrize("layer", [0, 1, 2, -1, -3])
def test_embeddings_and_class_attention_of_any_layer(layer: int) -> None:
    model, pixels = build(), pictures()
    encoder = model.encoder
    x = encoder.embed(model.patchify(pixels))
    for block in encoder.layers[: layer % 3]:
        x = plain_block(block, x)
    query, key = (
        encoder.layers[layer].split(y)
        for y in encoder.layers[layer].qkv(encoder.layers[layer].norm1(x)).chunk(3, dim=2)[:2]
    )
    attention = (query @ key.transpose(2, 3) / math.sqrt(8)).softmax(3)  # (B, H, 1 + N, 1 + N)
    received = model.attention_of_class_token(pixels, layer)
    assert received.shape == (3, 3, N) and not received.requires_grad
    assert_close(received, attention[:, :, 0, 1:].detach())
    x = plain_block(encoder.layers[layer], x)[:, 1:]
    assert_close(model.embeddings(pixels, layer, norm=False), x)
    assert_close(model.embeddings(pixels, layer), encoder.norm(x))


def test_last_embeddings_are_the_encoders_output() -> None:
    model, pixels = build(), pictures()
    assert_close(model.embeddings(pixels), model.encoder(model.patchify(pixels))[:, 1:])


# Ways of running


@pytest.mark.parametrize("given", ["drawn", "mask", "selection"])
def test_compiles_without_graph_breaks(given: str) -> None:
    model, pixels = build(), pictures()
    mask = {"drawn": None, "mask": masks(3, 15, 1)}.get(given)
    if given == "selection":
        mask = ops.select_tokens(torch.rand(3, N, generator=rng()), num_masked=12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for forward in (model, compiled):
        torch.manual_seed(5)
        out = forward(pixels, mask)
        results.append((out.mask, out.loss, *torch.autograd.grad(out.loss, model.parameters())))
    torch._dynamo.reset()
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-6)


def test_autocast_and_checkpointing() -> None:
    model, pixels, mask = build(), pictures(), masks(12, 12, 12)
    exact = model(pixels, mask).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(pixels, mask)
        attention = model.attention_of_class_token(pixels)
    assert out.loss.dtype == attention.dtype == torch.float32
    torch.testing.assert_close(out.loss, exact, rtol=0.05, atol=0)
    gradients = torch.autograd.grad(exact, model.parameters())
    model.gradient_checkpointing_enable()
    again = model(pixels, mask).loss
    for expected, actual in zip(
        gradients, torch.autograd.grad(again, model.parameters()), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    model = build(norm_pix_loss=True)
    model.encoder.positions.mul_(0.5)  # others' positions stay with the weights
    model.save_pretrained(tmp_path)
    loaded = MAEForPretraining.from_pretrained(tmp_path)
    assert loaded.config == model.config
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


def test_what_is_not_there_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = "allowed is a folder or hub name that holds what MAEForPretraining.save_pretrained"
    with pytest.raises(ValueError, match=f"got '{tmp_path}', a folder without config.*{allowed}"):
        MAEForPretraining.from_pretrained(tmp_path)
    build().save_pretrained(tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"half', a folder without model.safeten.*{allowed}"):
        MAEForPretraining.from_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match=f"missing', no folder, and on the hub: Repo .*{allowed}"):
        MAEForPretraining.from_pretrained(tmp_path / "missing")

    def not_found(*_: object, **__: object) -> None:
        raise FileNotFoundError("404\nnothing")

    monkeypatch.setattr(hub, "hf_hub_download", not_found)
    with pytest.raises(ValueError, match=f"got 'a/b', no folder, and on the hub: 404 n.*{allowed}"):
        MAEForPretraining.from_pretrained("a/b")


def test_a_folder_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit_mae", "patch_size": 16}')
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "config.json"))
    for source in (tmp_path, "facebook/vit-mae-base"):
        message = f"got '{source}', a model of transformers, 'vit_mae', allowed is .*; take MAEForP"
        with pytest.raises(ValueError, match=message + r"retraining\.from_hugging_face\("):
            MAEForPretraining.from_pretrained(source)
    with pytest.raises(
        ValueError, match="a model of transformers, 'vit_mae', allowed is .* wrote$"
    ):
        SMAForPretraining.from_pretrained(tmp_path)


def test_presets() -> None:
    small = MAEConfig.preset("mae-32", mask_ratio=0.6)
    assert (small.image_size, small.num_patches, small.mask_ratio) == (32, 64, 0.6)
    for name, millions in (("mae-32", 3), ("mae-tiny", 7), ("mae-base", 112), ("mae-large", 329)):
        config = MAEConfig.preset(name)
        with torch.device("meta"):
            model = MAEForPretraining(config)
        count = sum(p.numel() for p in model.parameters()) / 1e6
        assert round(count) == millions, f"{name} has {count:.1f} million"
        assert MAEConfig(**dataclasses.asdict(config)) == config


# Weights shared with transformers


@pytest.fixture
def transformers() -> None:
    if MISSING:
        without(MISSING)


def noise() -> torch.Tensor:
    return torch.rand(3, N, generator=rng(3))


def their_model(**changes) -> "ViTMAEForPreTraining":
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(ViTMAEConfig(**(SIZES | {"initializer_range": 0.2} | changes)))
    with torch.no_grad():  # biases, class token and positions that matter, whatever their version
        for name, parameter in model.named_parameters():
            if "token" in name or "pos" in name or name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def assert_same_model(ours: MAEForPretraining, theirs: "ViTMAEForPreTraining") -> None:
    pixels = pictures()
    expected, actual = theirs(pixels, noise=noise()), ours(pixels, noise=noise())
    assert_close(actual.loss, expected.loss)
    assert_close(actual.pixels, expected.logits)
    assert torch.equal(actual.mask, expected.mask.bool())
    visible = int(N * 0.25)  # theirs are in the order of the noise, ours in raster order
    assert torch.equal(actual.ids_restore < visible, expected.ids_restore < visible)
    for mine, other in (
        (ours.encoder.patches.weight, theirs.vit.embeddings.patch_embeddings.projection.weight),
        (ours.decoder.mask_token, theirs.decoder.mask_token),
    ):
        gradients = [
            torch.autograd.grad(x.loss, y, retain_graph=True)[0]
            for x, y in ((actual, mine), (expected, other))
        ]
        assert_close(gradients[0].norm(), gradients[1].norm())
    hidden = theirs.vit.embeddings.config.mask_ratio
    theirs.vit.embeddings.config.mask_ratio = 0.0
    whole = theirs.vit(pixels, noise=torch.arange(N).expand(3, -1)).last_hidden_state
    theirs.vit.embeddings.config.mask_ratio = hidden
    assert_close(ours.embeddings(pixels), whole[:, 1:])


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_transformers_weights_both_ways(norm_pix_loss: bool, qkv_bias: bool) -> None:
    changes = {"norm_pix_loss": norm_pix_loss, "qkv_bias": qkv_bias}
    theirs = their_model(**changes)
    ours = MAEForPretraining.from_hugging_face(theirs)
    assert ours.config.layer_norm_eps == 1e-12
    assert_same_model(ours, theirs)
    back = ours.to_hugging_face().eval()
    expected = theirs.state_dict()
    assert back.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in back.state_dict().items())

    ours = build(**changes)
    theirs = ours.to_hugging_face().eval()
    assert_same_model(ours, theirs)
    again = MAEForPretraining.from_hugging_face(theirs.state_dict(), theirs.config)
    assert again.config == ours.config
    kept = ours.state_dict()
    assert all(torch.equal(value, kept[key]) for key, value in again.state_dict().items())


OLD_NAMES = (  # of transformers 4, and of the published checkpoints
    ("vit.layers.", "vit.encoder.layer."),
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)


@pytest.mark.usefixtures("transformers")
def test_transformers_older_names() -> None:
    theirs = their_model()
    weights = {}
    for name, value in theirs.state_dict().items():
        for new, old in OLD_NAMES:
            name = name.replace(new, old)
        weights[name] = value
    assert "vit.encoder.layer.0.attention.attention.query.weight" in weights
    assert_same_model(MAEForPretraining.from_hugging_face(weights, theirs.config), theirs)


@pytest.mark.usefixtures("transformers")
def test_transformers_weights_that_do_not_fit() -> None:
    theirs = their_model()
    weights = theirs.state_dict()
    load = MAEForPretraining.from_hugging_face
    with pytest.raises(TypeError, match="config: got None"):
        load(weights)
    with pytest.raises(ValueError, match="unknown: head.weight"):
        load(weights | {"head.weight": torch.zeros(1)}, theirs.config)
    with pytest.raises(ValueError, match="of another shape: .*encoder.layers.0.mlp.0.bias"):
        load(
            weights,
            dataclasses.replace(MAEConfig.from_hugging_face(theirs.config), intermediate_size=44),
        )
    del weights["vit.layers.1.attention.k_proj.weight"]
    with pytest.raises(ValueError, match="missing: encoder.layers.1.qkv.weight/1"):
        load(weights, theirs.config)
    with pytest.raises(ValueError, match="hidden_act: got 'relu', allowed is 'gelu'"):
        MAEConfig.from_hugging_face(ViTMAEConfig(hidden_act="relu"))
    with pytest.raises(ValueError, match="hidden_dropout_prob: got 0.1"):
        MAEConfig.from_hugging_face({"hidden_dropout_prob": 0.1})


@pytest.mark.usefixtures("transformers")
def test_transformers_defaults() -> None:
    expected = MAEConfig.from_hugging_face(ViTMAEConfig())
    assert MAEConfig.from_hugging_face({"model_type": "vit_mae"}) == expected
    assert expected == MAEConfig(layer_norm_eps=1e-12)


# Wrong arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18}, "image_size: got 18, allowed is a multiple of patch_size"),
        ({"patch_size": 0}, "patch_size: got 0, allowed is an int of at least 1"),
        ({"hidden_size": 25}, "hidden_size: got 25, allowed is a multiple of 4 and of num_att"),
        ({"decoder_hidden_size": 18}, "decoder_hidden_size: got 18"),
        ({"mask_ratio": 1.0}, "mask_ratio: got 1.0"),
        ({"mask_ratio": 0.0}, "mask_ratio: got 0.0"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps: got -1.0"),
        ({"image_size": [16, 16]}, "image_size: got list"),
        ({"norm_pix_loss": 1}, "norm_pix_loss: got int"),
    ],
)
def test_config_refuses(changes: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        MAEConfig(**(SIZES | changes))
    with pytest.raises(ValueError, match="name: got 'mae-huge', allowed is 'mae-32'"):
        MAEConfig.preset("mae-huge")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pixels": torch.zeros(3, 3, 16, 20)}, r"pixels: got shape .*, allowed is \(B, 3, 16, 16"),
        ({"pixels": torch.zeros(3, 1, 16, 16)}, "pixels: got shape"),
        ({"pixels": torch.zeros(3, 16, 16)}, "pixels: got shape"),
        ({"pixels": torch.zeros(3, 3, 16, 16, dtype=torch.uint8)}, "pixels: got torch.uint8"),
        ({"pixels": [[0.0]]}, "pixels: got list"),
        ({"mask": torch.zeros(3, 15, dtype=torch.bool)}, r"mask: got shape \(3, 15\), allowed"),
        ({"mask": torch.zeros(3, N)}, "mask: got torch.float32, allowed is bool"),
        ({"mask": masks(4, 0, 4)}, "mask: got a row with 0 of 16 patches masked, allowed is 1"),
        ({"mask": masks(4, 16, 4)}, "mask: got a row with 16 of 16"),
        ({"mask": ops.select_tokens(torch.rand(3, N), num_masked=16)}, "mask: got a row with 16"),
        ({"mask": ops.select_tokens(torch.rand(2, N), num_masked=6)}, "mask: got shape"),
        (
            {
                "mask": ops.select_tokens(
                    torch.rand(3, N), num_masked=6, key_padding_mask=masks(3, 3, 3)
                )
            },
            "mask: got a selection with padding",
        ),
        ({"mask": masks(4, 4, 4), "noise": torch.rand(3, N)}, "mask, noise: got both"),
        ({"noise": torch.rand(3, 15)}, "noise: got shape"),
        ({"generator": 3}, "generator: got int"),
    ],
)
def test_forward_refuses(arguments: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        build()(**({"pixels": pictures()} | arguments))


@pytest.mark.parametrize("layer", [3, -4, 1.0, True])
def test_layers_that_do_not_exist(layer: int) -> None:
    for function in (build().embeddings, build().attention_of_class_token):
        with pytest.raises(ValueError, match=rf"layer: got {layer}, allowed is an int in \[-3, 2"):
            function(pictures(), layer)


def test_sizes_of_transformers_may_be_pairs() -> None:
    theirs = pytest.importorskip("transformers").ViTMAEConfig()
    given = theirs.to_dict() | {"image_size": [32, 32], "patch_size": (4, 4)}
    config = MAEConfig.from_hugging_face(given)
    assert (config.image_size, config.patch_size) == (32, 4)
    with pytest.raises(ValueError, match=r"^image_size: got \[32, 64\], allowed is a number, or"):
        MAEConfig.from_hugging_face(given | {"image_size": [32, 64]})
