"""What a run is asked for, checked before any data is read."""

import dataclasses
import math
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sma_fast.models import MAEConfig, SMAConfig
from sma_fast.training.data.sequences import VOCABULARY
from sma_fast.training.mae_presets import AUGMENTATIONS, MASKS, mae_policy, mae_preset
from sma_fast.training.presets import Preset, Schedule, preset

TASKS = {
    "classification": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}


_NOT_HERE = {  # fields of SMAConfig that something else decides
    "masking": "--set-mask",
    "input_type": "what the preset reads: choose another preset",
    "num_labels": "what the labels say",
    "problem_type": "--task",
}


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Where rows come from.

    Attributes:
        source: files, a folder, or a name on the Hugging Face hub.
        validation, test: sources of their own for these parts.
        split_column: column that says which part a row belongs to.
        parts: values of that column by part, such as {"valid": "validation"}.
        validation_share: cut from the train part where there is no validation part, .05 unless
            given.
        test_share: cut from `source` where none of the above is given.
        split_seed: of that cut.
        format: see `sma_fast.training.data.load`.
        columns: names of the columns of a file without a header line.
        inputs: columns to encode. Default: the only text column, all columns of a table but labels
            and split, or "image".
        min_length, max_length: shorter or longer sequences are left out, in bytes.
        too_long: what to do with sequences longer than the model: "error" or "truncate".
        alphabet: the only characters that sequences may hold. Default: any.
        exclude: columns of a table that are no inputs, such as labels of a later task.
        resize: filter that brings pictures to `size`.
        size: height and width of pictures. Default: that of the first one, which all must have; of
            a masked autoencoder its own.
        skip_damaged: whether damaged pictures are left out, and counted, not refused.
        cache: folder of converted files.
    """

    source: tuple[str, ...]
    validation: str | None = None
    test: str | None = None
    split_column: str | None = None
    parts: Mapping[str, str] | None = None
    validation_share: float | None = None
    test_share: float | None = None
    split_seed: int = 0
    format: str | None = None
    columns: tuple[str, ...] | None = None
    inputs: tuple[str, ...] | None = None
    min_length: int | None = None
    max_length: int | None = None
    too_long: str = "error"
    alphabet: str | None = None
    exclude: tuple[str, ...] | None = None
    resize: str | None = None
    size: tuple[int, int] | None = None
    skip_damaged: bool = False
    cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("validation_share", "test_share"):
            if getattr(self, name) is None:
                continue
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed is [0, 1)")
        if self.test_share and (self.split_column or self.test or self.validation):
            raise ValueError("test_share: allowed without split_column, validation and test only")
        if self.validation_share and self.validation:
            raise ValueError("validation_share: allowed without a validation source only")
        if self.share_to_validate + (self.test_share or 0.0) >= 1:
            raise ValueError("validation_share, test_share: allowed is a sum below 1")
        if self.split_column and (self.validation or self.test):
            raise ValueError("split_column: allowed without validation and test sources only")
        if self.parts and not self.split_column:
            raise ValueError("parts: allowed with split_column only")
        for part in self.parts or ():
            if part not in ("train", "valid", "test"):
                raise ValueError(f"parts: got {part!r}, allowed is train, valid, test")

    @property
    def share_to_validate(self) -> float:
        """The share of the train part that validates where there is no validation part."""
        return 0.05 if self.validation_share is None else self.validation_share


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How to train; what is None comes from the preset.

    Attributes:
        out: folder for checkpoints, the model and results.
        kind: "sma", or "mae" for a masked autoencoder of pictures, in pretraining.
        preset, scale: see `sma_fast.training.presets` and `mae_presets`.
        mask: for pretraining: "guided" or "random"; of "mae" one of `mae_presets.MASKS`.
        model, masking: fields of SMAConfig and SMAMasking, or MAEConfig and the policy, that differ
            from the preset.
        augment: of "mae", see `sma_fast.training.mae`. Default: "flip".
        epochs: passes over the train part, above 0.
        steps: optimiser steps, at least 1; takes the place of `epochs`.
        batch_size: rows of a step, over all processes and accumulated batches.
        learning_rate: at its peak, above 0. Default: the preset's; of "mae" in proportion to the
            batch.
        weight_decay: of AdamW, at least 0.
        warmup_steps: over which the learning rate rises, at least 0. Default: the preset's, at most
            a fifth of the run.
        scheduler: "cosine", "constant" or "linear", after the warm-up.
        seed: of weights, order, masks and dropout, in [0, 2^32).
        accumulate: batches whose gradients make a step.
        workers: processes that read data.
        bf16: autocast to bfloat16.
        compile: torch.compile; annealed masks then change in stages.
        gradient_checkpointing: computes activations again in the backward pass.
        fsdp: mode of transformers.TrainingArguments, on GPUs under torchrun.
        save_steps: steps between checkpoints, and validations. Default: ten in a run.
        keep_checkpoints: all of them, not only the last two and the best one.
        resume: go on from the newest whole checkpoint in `out`.
        tensorboard: write curves.
        patience: validations without a better one after which fine-tuning stops. Default: never.
        limit_train: use this many rows of the train part only, at least 1.
        progress_bar: whether there is one.
    """

    out: Path
    kind: str = "sma"
    preset: str = "language"
    scale: str = "full"
    mask: str = "guided"
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    masking: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    augment: str | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    warmup_steps: int | None = None
    scheduler: str | None = None
    seed: int = 0
    accumulate: int = 1
    workers: int = 0
    bf16: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False
    fsdp: str | None = None
    save_steps: int | None = None
    keep_checkpoints: bool = False
    resume: bool = False
    tensorboard: bool = False
    patience: int | None = None
    limit_train: int | None = None
    progress_bar: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_steps", "patience", "limit_train"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, allowed is at least 1")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: got {value}, allowed is above 0")
        for name in ("weight_decay", "warmup_steps", "workers"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}: got {value}, allowed is at least 0")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: got {self.seed}, allowed is [0, 2^32)")
        if self.kind not in ("sma", "mae"):
            raise ValueError(f"kind: got {self.kind!r}, allowed is sma, mae")
        masks = MASKS if self.kind == "mae" else ("guided", "random")
        if self.mask not in masks:
            also = "; --model mae has others" if self.mask in MASKS else ""
            raise ValueError(
                f"mask: got {self.mask!r}, allowed is {', '.join(masks)} with --model "
                f"{self.kind}{also}"
            )
        if self.augment is not None and (self.kind != "mae" or self.augment not in AUGMENTATIONS):
            raise ValueError(
                f"augment: got {self.augment!r}, allowed is {', '.join(AUGMENTATIONS)}, with "
                "--model mae only"
            )
        if self.scheduler not in (None, "cosine", "constant", "linear"):
            raise ValueError(
                f"scheduler: got {self.scheduler!r}, allowed is cosine, constant, linear"
            )
        self.start()

    def start(self) -> Preset:
        """Returns the preset.

        Raises:
            ValueError: for an unknown one.
        """
        return (mae_preset if self.kind == "mae" else preset)(self.preset, self.scale)

    def check(self) -> None:
        """Refuses options that do not go together, by themselves and with the preset.

        Raises:
            ValueError: naming the option, what was given and what is allowed.
        """
        if self.kind == "mae":
            mae_policy(self.mask, self.config(), self.masking, self.out)
            if self.fsdp:
                raise ValueError(f"fsdp: got {self.fsdp!r}, allowed is none with --model mae")
            return
        for name, instead in _NOT_HERE.items():
            if name in self.model:
                raise ValueError(f"{name}: got {self.model[name]!r} in model, allowed is {instead}")
        if "mask" in self.masking:
            raise ValueError(f"mask: got {self.masking['mask']!r} in masking, allowed is --mask")
        hints = typing.get_type_hints(SMAConfig)
        for name, value in self.model.items():
            if name in hints and not _fits(value, hints[name]):
                kind = getattr(hints[name], "__name__", str(hints[name]))
                raise ValueError(f"{name}: got {value!r}, allowed is of type {kind}")
        config, encoding = self.config(), self.start().encoding
        if encoding == "bytes" and config.num_discrete_tokens < VOCABULARY:
            raise ValueError(
                f"num_discrete_tokens: got {config.num_discrete_tokens}, allowed is at least "
                f"{VOCABULARY} with preset {self.preset!r}, which reads bytes"
            )
        if encoding == "table" and config.input_channels != 1:
            raise ValueError(
                f"input_channels: got {config.input_channels}, allowed is 1 with preset "
                f"{self.preset!r}, which reads tables"
            )
        if config.encoder_type == "self_attention" and config.masking.num_queries is not None:
            most = config.max_position_embeddings
            if config.masking.num_queries > most:
                raise ValueError(
                    f"num_queries: got {config.masking.num_queries}, allowed is at most {most}, "
                    "the longest row"
                )
        if self.fsdp and not (torch.cuda.is_available() and "WORLD_SIZE" in os.environ):
            raise ValueError(f"fsdp: got {self.fsdp!r}, allowed is with GPUs under torchrun only")
        if self.mask == "guided" and config.encoder_type == "cross_attention":
            config.masking.count_queries(config.max_position_embeddings, config.num_latents)

    def config(self, changes: Mapping[str, Any] | None = None) -> SMAConfig | MAEConfig:
        """Returns the config of a new model.

        Args:
            changes: fields that the data decide, weaker than those of the options.

        Raises:
            ValueError: for unknown fields and those that do not go together.
        """
        masking = dict(self.masking)
        if self.kind == "sma":
            masking["mask"] = self.mask
        try:
            return self.start().config({**(changes or {}), **self.model}, masking)
        except TypeError as error:
            raise ValueError(f"options of model and masking: {error}") from None

    def schedule(self, finetuning: bool) -> Schedule:
        """Returns the preset's schedule with what the options change."""
        chosen = self.start().finetuning if finetuning else self.start().pretraining
        changes = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(Schedule)
            if getattr(self, field.name, None) is not None
        }
        if self.warmup_steps is not None:
            changes["warmup_share"] = None
        if self.kind == "mae" and self.batch_size and self.learning_rate is None:
            changes["learning_rate"] = chosen.learning_rate * self.batch_size / chosen.batch_size
        return dataclasses.replace(chosen, **changes)


def _fits(value: object, hint: object) -> bool:
    kinds = typing.get_args(hint) or (hint,)  # int | None
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, tuple(kinds)) or isinstance(value, int) and float in kinds
