"""Weights of transformers' ViTMAEForPreTraining by their names here, both ways."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sma_fast.models.vit_config import MAEConfig

_NAMES = {
    "vit.embeddings.cls_token": "encoder.class_token",
    "vit.embeddings.position_embeddings": "encoder.positions",
    "vit.embeddings.patch_embeddings.projection.": "encoder.patches.",
    "vit.layernorm.": "encoder.norm.",
    "decoder.mask_token": "decoder.mask_token",
    "decoder.decoder_pos_embed": "decoder.positions",
    "decoder.decoder_embed.": "decoder.embed.",
    "decoder.decoder_norm.": "decoder.norm.",
    "decoder.decoder_pred.": "decoder.output.",
}
# transformers 5 first, then what it was before, as in the published checkpoints
_LAYER = re.compile(
    r"(?:vit\.(?:encoder\.layer|layers)|(?P<decoder>decoder\.decoder_layers))\.(?P<index>\d+)\."
    r"(?P<part>.+)\.(?P<kind>weight|bias)"
)
_PARTS = {
    "attention.q_proj": "qkv/0",
    "attention.k_proj": "qkv/1",
    "attention.v_proj": "qkv/2",
    "attention.o_proj": "output",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "attention.attention.query": "qkv/0",
    "attention.attention.key": "qkv/1",
    "attention.attention.value": "qkv/2",
    "attention.output.dense": "output",
    "intermediate.dense": "mlp.0",
    "output.dense": "mlp.2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}


def ours(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns transformers' weights under the names, and in the shapes, of MAEForPretraining.

    Args:
        weights: by transformers' names.
        expected: the state dict of the model they are for.

    Raises:
        ValueError: listing what is unknown, missing or of another shape.
    """
    parts = {f"{name}/{i}": x for name, x in expected.items() for i, x in enumerate(_cut(name, x))}
    found = {_our_part(name): value for name, value in weights.items()}
    unknown = [name for name in weights if _our_part(name) not in parts]
    missing = sorted(parts.keys() - found.keys())
    misshapen = []
    for part in parts.keys() & found.keys():
        shape, found[part] = found[part].shape, _to_ours(found[part], parts[part])
        if found[part] is None:
            misshapen.append(f"{part} {tuple(shape)} for {tuple(parts[part].shape)}")
    problems = {"unknown": unknown, "missing": missing, "of another shape": sorted(misshapen)}
    if any(problems.values()):
        raise ValueError(
            "model_or_state_dict: "
            + "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        )
    return {
        name: torch.cat([found[f"{name}/{i}"] for i in range(len(_cut(name, x)))])
        for name, x in expected.items()
    }


def theirs(config: MAEConfig, weights: Mapping[str, Tensor]) -> Any:
    """Returns transformers' ViTMAEForPreTraining with these weights.

    Args:
        config: of the model.
        weights: its state dict.

    Raises:
        ImportError: where transformers is not installed.
    """
    try:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
    except ImportError as error:
        raise ImportError(f"to_hugging_face: {error}: pip install 'sma_fast[train]'") from None
    model = ViTMAEForPreTraining(ViTMAEConfig(**vars(config)))
    parts = {f"{name}/{i}": x for name, x in weights.items() for i, x in enumerate(_cut(name, x))}
    state = {name: _to_theirs(parts[_our_part(name)], x) for name, x in model.state_dict().items()}
    model.load_state_dict(state)
    first = next(iter(weights.values()))
    return model.to(device=first.device, dtype=first.dtype)


def _cut(name: str, x: Tensor) -> tuple[Tensor, ...]:
    # queries, keys and values are one matrix here and three there
    return x.chunk(3) if ".qkv." in name else (x,)


def _our_part(name: str) -> str | None:
    # "encoder.layers.0.qkv.weight/1", the number being that of _cut
    layer = _LAYER.fullmatch(name)
    if layer is not None:
        part, _, number = _PARTS.get(layer["part"], "?").partition("/")
        side = "decoder" if layer["decoder"] else "encoder"
        return f"{side}.layers.{layer['index']}.{part}.{layer['kind']}/{number or 0}"
    for start, start_here in _NAMES.items():
        if name == start or (start.endswith(".") and name.startswith(start)):
            return start_here + name.removeprefix(start) + "/0"
    return None


def _to_ours(value: Tensor, like: Tensor) -> Tensor | None:
    # None where the shape is another
    if value.dim() == 4:  # of a convolution; patches have their channels last here
        value = value.permute(0, 2, 3, 1).flatten(1)
    while value.dim() > like.dim() and value.shape[0] == 1:
        value = value[0]
    return value if value.shape == like.shape else None


def _to_theirs(value: Tensor, like: Tensor) -> Tensor:
    if like.dim() == 4:
        width, channels, size, _ = like.shape
        return value.view(width, size, size, channels).permute(0, 3, 1, 2)
    return value.reshape(like.shape)
