"""What a run starts from: the published settings of five domains, and sizes for two cores.

"full" is as published; "(inferred)" and "(chosen)" mark what the publication leaves open. "small"
keeps the method and shrinks width, depth and length until two cores train it in minutes.

Source: Self-Guided Masked Autoencoders (arXiv 2402.14789), appendix.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sma_fast.masking.sma import SMAMasking
from sma_fast.models import SMAConfig

SCALES = ("full", "small")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a model is trained.

    Attributes:
        batch_size: samples in a step, over all processes.
        learning_rate: at its peak.
        weight_decay: of AdamW.
        warmup_steps: of the learning rate.
        epochs: passes over the data.
        scheduler: "cosine" or "linear" to 0, or "constant".
        warmup_share: of the run, instead of `warmup_steps`.
        adam_beta2: of AdamW.
    """

    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    epochs: float
    scheduler: str = "cosine"
    warmup_share: float | None = None
    adam_beta2: float = 0.999


@dataclasses.dataclass(frozen=True)
class Preset:
    """One domain at one scale.

    Attributes:
        encoding: "bytes", "table" or "pictures".
        model: fields of SMAConfig.
        masking: fields of SMAMasking.
        pretraining, finetuning: Schedule.
        dropout: fields of SMAConfig for fine-tuning.
    """

    encoding: str
    model: Mapping[str, Any]
    masking: Mapping[str, Any]
    pretraining: Schedule
    finetuning: Schedule
    dropout: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def config(self, changes: Mapping[str, Any], masking: Mapping[str, Any]) -> SMAConfig:
        """Returns the model's config.

        Args:
            changes: fields of SMAConfig that differ.
            masking: fields of SMAMasking that differ.

        Raises:
            TypeError, ValueError: for unknown fields, and values that do not go together.
        """
        return SMAConfig(
            **{**self.model, **changes, "masking": SMAMasking(**{**self.masking, **masking})}
        )


_LANGUAGE = {
    "input_type": "discrete",
    "encoder_type": "cross_attention",
    "max_position_embeddings": 1024,
    "embedded_channels": 512,
    "num_latents": 256,
    "latent_channels": 1024,
    "num_self_attends_per_block": 16,
    "num_self_attention_heads": 8,
    "num_cross_attention_heads": 8,
    "qk_channels": 256,
    "v_channels": 1024,  # (inferred)
    "decoder_channels": 512,
    "decoder_heads": 8,
}
_SMALL_LATENTS = {
    "max_position_embeddings": 256,
    "embedded_channels": 64,
    "num_latents": 48,
    "latent_channels": 96,
    "num_self_attends_per_block": 3,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 4,
    "qk_channels": 64,
    "v_channels": 96,
    "decoder_channels": 64,
    "decoder_heads": 4,
    "initializer_range": 0.05,
    "pe_initializer_range": 0.05,
}
_MOLECULE = {
    "input_type": "discrete",
    "encoder_type": "self_attention",
    "max_position_embeddings": 512,
    "embedded_channels": 768,
    "latent_channels": 768,
    "num_self_attends_per_block": 12,
    "num_self_attention_heads": 12,
    "num_cross_attention_heads": 12,
    "decoder_channels": 768,
    "decoder_heads": 1,
}
_PHYSICS = {
    "input_type": "continuous",
    "encoder_type": "self_attention",
    "input_channels": 1,
    "max_position_embeddings": 28,
    "embedded_channels": 128,
    "latent_channels": 128,
    "num_self_attends_per_block": 4,  # (inferred)
    "num_self_attention_heads": 8,  # (chosen)
    "num_cross_attention_heads": 8,  # (chosen)
    "qk_channels": 128,
    "decoder_channels": 128,
    "decoder_heads": 1,
    "share_embedding_weights": False,
}
_IMAGE = {
    "input_type": "continuous",
    "encoder_type": "cross_attention",
    "input_channels": 3,
    "max_position_embeddings": 192 * 192,
    "embedded_channels": 64,  # (chosen), and all below
    "num_latents": 512,
    "latent_channels": 512,
    "num_self_attends_per_block": 8,
    "num_self_attention_heads": 8,
    "num_cross_attention_heads": 8,
    "decoder_channels": 64,
    "decoder_heads": 8,
    "share_embedding_weights": False,
}
_BY_ONE_HEAD = {"head_reduce": "random", "mask_self": True, "select_initial_ratio": 1.0}
_MOLECULE_MASK = {"mask_ratio": 0.30, "num_per_query": 3, **_BY_ONE_HEAD}
_PHYSICS_MASK = {
    "mask_ratio": 0.20,
    "num_per_query": 3,
    "schedule_length_ratio": 0.25,
    **_BY_ONE_HEAD,
}
_LANGUAGE_MASK = {"mask_ratio": 0.15, "num_per_query": 4, "head_reduce": "mean"}

PRESETS = {
    "protein": {
        "full": Preset(
            "bytes",
            _LANGUAGE,  # (inferred)
            _LANGUAGE_MASK,  # num_per_query (inferred)
            Schedule(256, 3e-4, 0.01, 5000, 10),
            Schedule(64, 5e-5, 0.01, 1000, 30),  # batch (chosen)
        ),
        "small": Preset(
            "bytes",
            _LANGUAGE | _SMALL_LATENTS,
            _LANGUAGE_MASK,
            Schedule(32, 1e-3, 0.01, 100, 2),
            Schedule(32, 1e-3, 0.01, 50, 6),
        ),
    },
    "molecule": {
        "full": Preset(
            "bytes",
            _MOLECULE,
            _MOLECULE_MASK,
            Schedule(128, 1e-4, 0.01, 10_000, 30),
            Schedule(32, 1e-4, 0.001, 50, 40),
        ),
        "small": Preset(
            "bytes",
            _MOLECULE
            | {
                "max_position_embeddings": 160,
                "embedded_channels": 64,
                "latent_channels": 64,
                "num_self_attends_per_block": 3,
                "num_self_attention_heads": 4,
                "num_cross_attention_heads": 4,
                "decoder_channels": 64,
                "initializer_range": 0.05,
                "pe_initializer_range": 0.05,
            },
            _MOLECULE_MASK,
            Schedule(64, 1e-3, 0.01, 100, 1),
            Schedule(32, 5e-4, 0.001, 50, 20),
        ),
    },
    "physics": {
        "full": Preset(
            "table",
            _PHYSICS,
            _PHYSICS_MASK,
            Schedule(256, 1e-4, 0.01, 10_000, 50),
            Schedule(128, 3e-5, 1e-5, 0, 200, "constant"),
            {
                "attention_dropout_prob": 0.1,
                "hidden_dropout_prob": 0.1,
            },
        ),
        "small": Preset(
            "table",
            _PHYSICS
            | {
                "embedded_channels": 64,
                "latent_channels": 64,
                "num_self_attends_per_block": 3,
                "num_self_attention_heads": 4,
                "num_cross_attention_heads": 4,
                "qk_channels": 64,
                "decoder_channels": 64,
                "initializer_range": 0.05,
                "pe_initializer_range": 0.05,
            },
            _PHYSICS_MASK,
            Schedule(256, 1e-3, 0.01, 100, 4),
            Schedule(128, 5e-4, 1e-5, 20, 20),
            {"hidden_dropout_prob": 0.1},
        ),
    },
    "language": {
        "full": Preset(
            "bytes",
            _LANGUAGE,
            _LANGUAGE_MASK,
            Schedule(256, 1e-4, 0.01, 5000, 10),  # epochs (chosen): published are 1M steps
            Schedule(32, 5e-5, 0.01, 1000, 10),  # (chosen)
        ),
        "small": Preset(
            "bytes",
            _LANGUAGE | _SMALL_LATENTS,
            _LANGUAGE_MASK,
            Schedule(32, 1e-3, 0.01, 100, 2),
            Schedule(32, 5e-4, 0.01, 50, 10),
        ),
    },
    "image": {
        "full": Preset(
            "pictures",
            _IMAGE,
            {"mask_ratio": 0.5, "num_queries": 32, "anneal_by": "pool"},  # (chosen)
            Schedule(64, 1e-4, 0.01, 5000, 100),
            Schedule(64, 5e-5, 0.01, 500, 50),
        ),
        "small": Preset(
            "pictures",
            _IMAGE
            | {
                "max_position_embeddings": 32 * 32,
                "embedded_channels": 32,
                "num_latents": 48,
                "latent_channels": 96,
                "num_self_attends_per_block": 3,
                "num_self_attention_heads": 4,
                "num_cross_attention_heads": 4,
                "decoder_channels": 32,
                "decoder_heads": 4,
                "initializer_range": 0.05,
                "pe_initializer_range": 0.05,
            },
            {"mask_ratio": 0.5, "num_queries": 8, "anneal_by": "pool"},
            Schedule(32, 1e-3, 0.01, 100, 2),
            Schedule(32, 5e-4, 0.01, 50, 5),
        ),
    },
}


def preset(name: str, scale: str) -> Preset:
    """Returns a preset.

    Raises:
        ValueError: for an unknown name or scale; lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: got {name!r}, allowed is {', '.join(PRESETS)}")
    if scale not in SCALES:
        raise ValueError(f"scale: got {scale!r}, allowed is {', '.join(SCALES)}")
    return PRESETS[name][scale]
