"""The published model's recorded results, and its checkpoints."""

import dataclasses
import json
import math

import pytest
import torch
from golden import RECORDED, golden, load_recorded, recorded_draws
from model_inputs import assert_close

import sma_fast
from sma_fast.masking.sma import SMAMasking
from sma_fast.models import load_published
from sma_fast.models.published import _our_name


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
