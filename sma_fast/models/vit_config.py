"""The sizes and settings of a masked autoencoder of pictures, and its presets."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sma_fast import _check
from sma_fast.masking.random import count_masked

# "base" and "large" are MAE's; the others are chosen here: "tiny" is DeiT's encoder with a decoder
# of the same width, "32" a size that two cores pretrain on pictures of 32 px. All of them
# reconstruct normalised patches, as MAE's own pretraining command does.
PRESETS: dict[str, dict[str, Any]] = {
    "mae-32": {
        "image_size": 32,
        "patch_size": 4,
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "decoder_hidden_size": 128,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 4,
    },
    "mae-tiny": {
        "hidden_size": 192,
        "num_attention_heads": 3,
        "decoder_hidden_size": 192,
        "decoder_num_hidden_layers": 4,
        "decoder_num_attention_heads": 3,
    },
    "mae-base": {},
    "mae-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
# transformers' defaults that differ, for a config.json that leaves them out
_THEIRS = {"layer_norm_eps": 1e-12, "intermediate_size": 3072, "decoder_intermediate_size": 2048}
_FIXED = {"hidden_act": "gelu", "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}


@dataclasses.dataclass
class MAEConfig:
    """Sizes of a masked autoencoder; names as in transformers' ViTMAEConfig, defaults ViT-B/16.

    Args:
        image_size: height and width of the pictures, in pixels; a multiple of `patch_size`.
        patch_size: height and width of a patch, in pixels.
        num_channels: of the pictures.
        hidden_size: C, width of the encoder; a multiple of 4 (positions) and of the heads.
        num_hidden_layers: of the encoder.
        num_attention_heads: H, of the encoder.
        intermediate_size: width of the encoder's MLPs. Default: 4 C.
        decoder_hidden_size: width of the decoder; a multiple of 4 and of its heads.
        decoder_num_hidden_layers: of the decoder.
        decoder_num_attention_heads: of the decoder.
        decoder_intermediate_size: width of the decoder's MLPs. Default: 4 times its width.
        qkv_bias: whether queries, keys and values have a bias.
        layer_norm_eps: of all normalisations; MAE's 1e-6 (transformers has 1e-12).
        initializer_range: standard deviation of the class and mask token at the start.
        mask_ratio: share of the patches to mask, in (0, 1), of which at least one must be masked
            and one visible: int(N (1 - mask_ratio)) are visible, as in MAE.
        norm_pix_loss: reconstruct each patch less its mean, over its deviation.

    Raises:
        TypeError, ValueError: naming the field, what was given and what is allowed.

    Source: Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377), appendix A.
    """

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int | None = None
    qkv_bias: bool = True
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    mask_ratio: float = 0.75
    norm_pix_loss: bool = False

    def __post_init__(self) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.decoder_intermediate_size is None:
            self.decoder_intermediate_size = 4 * self.decoder_hidden_size
        for field in dataclasses.fields(self):
            if field.type in (int, int | None):
                _check.positive_count(field.name, getattr(self, field.name))
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size: got {self.image_size}, allowed is a multiple of patch_size "
                f"({self.patch_size})"
            )
        for name, heads in (
            ("hidden_size", "num_attention_heads"),
            ("decoder_hidden_size", "decoder_num_attention_heads"),
        ):
            width, parts = getattr(self, name), getattr(self, heads)
            if width % parts or width % 4:
                raise ValueError(
                    f"{name}: got {width}, allowed is a multiple of 4 and of {heads} ({parts})"
                )
        for name in ("layer_norm_eps", "initializer_range"):
            _check.number(name, getattr(self, name))
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed is at least 0")
        for name in ("qkv_bias", "norm_pix_loss"):
            _check.flag(name, getattr(self, name))
        _check.ratio("mask_ratio", self.mask_ratio)
        if not 0 < count_masked(self.num_patches, self.mask_ratio) < self.num_patches:
            raise ValueError(
                f"mask_ratio: got {self.mask_ratio}, allowed is what masks at least 1 and not all "
                f"of {self.num_patches} patches"
            )

    @property
    def num_patches(self) -> int:
        """N."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_channels(self) -> int:
        """Values in a patch: patch_size squared times channels."""
        return self.patch_size**2 * self.num_channels

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "MAEConfig":
        """Returns the sizes of that name.

        Args:
            name: "mae-32" (32 px, patches of 4), "mae-tiny", "mae-base" or "mae-large" (224 px,
                patches of 16).
            changes: fields that differ.

        Returns:
            MAEConfig.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        _check.choice("name", name, tuple(PRESETS))
        known = [field.name for field in dataclasses.fields(cls)]
        for field in changes:
            if field not in known:
                raise TypeError(f"got {field!r}, allowed is {', '.join(known)}")
        return cls(**({"norm_pix_loss": True} | PRESETS[name] | changes))

    @classmethod
    def from_hugging_face(cls, config: Any) -> "MAEConfig":
        """Returns the same sizes.

        Args:
            config: transformers' ViTMAEConfig, or a mapping of its fields, as in config.json.

        Returns:
            MAEConfig.

        Raises:
            TypeError, ValueError: naming the field, for settings that this model does not have.
        """
        given = dict(config) if isinstance(config, Mapping) else config.to_dict()
        for name, allowed in _FIXED.items():
            if given.get(name, allowed) != allowed:
                raise ValueError(f"{name}: got {given[name]!r}, allowed is {allowed!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        given = _THEIRS | {name: given[name] for name in names & given.keys()}
        for name in ("image_size", "patch_size"):
            given[name] = _side(name, given.get(name, getattr(cls, name)))
        return cls(**given)


def _side(name: str, size: Any) -> Any:
    # transformers takes (height, width) too
    if not isinstance(size, (list, tuple)):
        return size
    if len(size) != 2 or size[0] != size[1]:
        raise ValueError(f"{name}: got {size!r}, allowed is a number, or two that are equal")
    return size[0]
