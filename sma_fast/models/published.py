"""Checkpoints of the SMA authors' code, read into this project's model."""

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor

from sma_fast.masking.sma import SMAMasking
from sma_fast.models.sma import SMAForPretraining
from sma_fast.models.sma_config import SMAConfig

# published prefix -> ours; the model is stored up to three times, under the last three names
_PREFIXES = {
    "perceiver.input_preprocessor.": "encoder.embedding.",
    "perceiver.encoding_latents.": "encoder.",
    "perceiver.encoder.cross_attention.": "encoder.first.",
    "perceiver.encoder.self_attends.": "encoder.layers.",
    "teacher.reconstruction_decoder.decoding_cross_attention.": "decoder.layer.",
    "teacher.reconstruction_decoder.pre_layernorm.": "decoder.context_norm.",
    "teacher.reconstruction_decoder.final_layernorm.": "decoder.norm.",
    "teacher.reconstruction_decoder.final_project.": "decoder.output.",
    "teacher.reconstruction_decoder.decoder_latents.latents": "decoder.queries.weight",
    "teacher.reconstruction_decoder.embedding_layer.": "encoder.embedding.tokens.",
    "teacher.reconstruction_decoder.encoder_input_preprocessor.": "encoder.embedding.",
    "teacher.encoder_input_preprocesor.": "encoder.embedding.",
}
_EMBEDDING = {
    "embeddings.": "tokens.",
    "input_projection.": "tokens.",
    "position_embeddings.": "positions.",
    "layernorm.": "norm.",
}
_LAYER = {
    "attention.attention.layernorm1.": "query_norm.",
    "attention.attention.": "",
    "attention.output.dense.": "output.",
    "layernorm.": "mlp_norm.",
    "mlp.dense1.": "mlp.0.",
    "mlp.dense2.": "mlp.2.",
}
_HEADS = {"mean": "mean", "random_mix": "random"}


def load_published(config: Mapping, state_dict: Mapping[str, Tensor]) -> SMAForPretraining:
    """Returns the model of a published checkpoint.

    Args:
        config: the authors' config.json. Its masker's arguments are found by their names
            (``masking_ratio``, ...) anywhere in it, and so are the decoder's
            (``query_num_channels``, ...). Without a masker the masking is SMAMasking's default.
        state_dict: the checkpoint, with or without the duplicate keys it was saved with.

    Returns:
        SMAForPretraining with these weights.

    Raises:
        ValueError: for keys that are unknown, missing or of another shape, for duplicates that
            differ, and for settings that this model does not have.

    Source: the checkpoints of Self-Guided Masked Autoencoders (arXiv 2402.14789).
    """
    model = SMAForPretraining(_config(config))
    weights: dict[str, Tensor] = {}
    unknown, differing = [], []
    for key, value in state_dict.items():
        name = _our_name(key)
        if name is None:
            unknown.append(key)
        elif name in weights and not torch.equal(weights[name], value):
            differing.append(key)
        else:
            weights[name] = value
    tied = model.decoder.output.weight is model.encoder.embedding.tokens.weight
    shared = model.decoder.queries is model.encoder.embedding.positions
    for ours, same, is_same in (
        ("decoder.output.weight", "encoder.embedding.tokens.weight", tied),
        ("decoder.queries.weight", "encoder.embedding.positions.weight", shared),
    ):
        if is_same and same in weights:
            weights.setdefault(ours, weights[same])
    expected = model.state_dict()
    problems = {
        "unknown": unknown + sorted(weights.keys() - expected.keys()),
        "differing duplicates": differing,
        "missing": sorted(expected.keys() - weights.keys()),
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} for {tuple(expected[name].shape)}"
            for name in weights.keys() & expected.keys()
            if weights[name].shape != expected[name].shape
        ],
    }
    if any(problems.values()):
        raise ValueError(
            "state_dict: "
            + "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        )
    model.load_state_dict(weights)
    return model


def _our_name(key: str) -> str | None:
    if key.startswith("teacher.student_model."):
        key = "perceiver." + key.removeprefix("teacher.student_model.")
    for theirs, ours in _PREFIXES.items():
        if not key.startswith(theirs):
            continue
        rest = key.removeprefix(theirs)
        if ours == "encoder.embedding.":
            return _renamed(ours, rest, _EMBEDDING)
        if ours == "encoder.layers.":
            index, _, rest = rest.partition(".")
            return _renamed(f"{ours}{index}.", rest, _LAYER)
        if ours in ("encoder.first.", "decoder.layer."):
            return _renamed(ours, rest, _LAYER)
        return ours + rest
    return None


def _renamed(prefix: str, rest: str, table: Mapping[str, str]) -> str | None:
    for theirs, ours in table.items():
        if rest.startswith(theirs):
            return prefix + ours + rest.removeprefix(theirs)
    return None


def _config(published: Mapping) -> SMAConfig:
    names = {f.name for f in fields(SMAConfig)} - {"masking", "num_labels", "problem_type"}
    sizes = {name: published[name] for name in names if name in published}
    for name, allowed in (
        ("hidden_act", "gelu"),
        ("use_position_embeddings", True),
        ("use_query_residual", True),
        ("final_project", True),
    ):
        if published.get(name, allowed) != allowed:
            raise ValueError(f"{name}: got {published[name]!r}, allowed is {allowed!r}")
    decoder = _find(published, "query_num_channels")
    if decoder is not None:
        width = decoder["query_num_channels"] or published["embedded_channels"]
        if decoder.get("post_decoder_layers") is not None or decoder.get("add_mask_token"):
            raise ValueError("post_decoder_layers, add_mask_token: allowed is neither")
        if (decoder.get("v_channels") or width) != width:
            raise ValueError(f"v_channels: got {decoder['v_channels']}, allowed is {width}")
        if not decoder.get("use_query_residual", False):
            raise ValueError("use_query_residual: got False, allowed is True")
        sizes |= {
            "decoder_channels": width,
            "decoder_qk_channels": decoder.get("qk_channels") or width,
            "decoder_heads": decoder.get("num_heads") or published.get("decoder_heads", 1),
            "decoder_widening_factor": decoder.get("widening_factor", 1),
            "share_decoder_queries": decoder.get("share_decoder_queries", False),
            "share_embedding_weights": decoder.get("share_embedding_weights", False),
        }
    masker = _find(published, "masking_ratio")
    if masker is not None:
        heads = masker.get("head_aggregation", "mean")
        if heads not in _HEADS:
            raise ValueError(f"head_aggregation: got {heads!r}, allowed is {', '.join(_HEADS)}")
        sizes["masking"] = SMAMasking(
            mask_ratio=masker["masking_ratio"],
            num_per_query=masker.get("num_per_query", 1),
            head_reduce=_HEADS[heads],
            mask_self=masker.get("mask_self", False),
            select_initial_ratio=masker.get("select_initial_ratio"),
            schedule_length_ratio=masker.get("schedule_length_ratio") or 1.0,
            anneal_by="share" if masker.get("varying_length", False) else "pool",
        )
    return SMAConfig(**sizes)


def _find(tree: object, name: str) -> Mapping | None:
    # the first mapping in nested mappings and lists that has the key `name`
    if isinstance(tree, Mapping):
        if name in tree:
            return tree
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return next((m for m in (_find(branch, name) for branch in tree) if m is not None), None)
    return None
