"""Pretraining with transformers.Trainer, which stays inside this file."""

import os
import tempfile
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import Dataset

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from transformers import ProgressCallback, Trainer, TrainingArguments  # noqa: E402
from transformers.utils import logging  # noqa: E402


@dataclass(frozen=True)
class Curve:
    """Training loss: `loss[i]` is the mean over the steps up to `step[i]` since the entry before.

    Attributes:
        step: optimiser steps done.
        loss: as the model returns it.
    """

    step: list[int]
    loss: list[float]


class Inputs(Dataset):
    """Samples of a tensor, as the model's `inputs`: (samples, N, ...)."""

    def __init__(self, inputs: torch.Tensor) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"inputs": self.inputs[index]}


class _LossBar(ProgressCallback):
    """The Trainer's progress bar with the loss beside it, not one line for each log entry."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}")


def pretrain(
    model: nn.Module,
    inputs: torch.Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    title: str = "",
    weight_decay: float = 0.01,
) -> Curve:
    """Trains `model` in place and returns its training loss.

    AdamW, one tenth of the steps warm-up, then a cosine to 0. The order of the samples depends on
    `seed` alone, not on what the model draws. Ends in evaluation mode on the device of `inputs`.

    Args:
        model: returns its loss first, for the keyword `inputs`.
        inputs: (samples, N, ...), all of them.
        steps: optimiser steps, at least 1.
        batch_size: samples in a step; an epoch leaves the last incomplete batch out.
        learning_rate: at its peak.
        seed: of order, masks and dropout.
        title: of the progress bar.
        weight_decay: of matrices.

    Returns:
        Curve of about 50 entries.

    Raises:
        ValueError: where there are fewer samples than `batch_size`.
    """
    if len(inputs) < batch_size:
        raise ValueError(f"batch_size: got {batch_size}, allowed is at most {len(inputs)} samples")
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="sma_fast-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup_steps=steps // 10,
            lr_scheduler_type="cosine",
            optim="adamw_torch_fused",
            seed=seed,
            data_seed=seed,
            logging_steps=max(1, steps // 50),
            logging_nan_inf_filter=False,
            log_level="error",
            save_strategy="no",
            report_to="none",
            disable_tqdm=False,
            use_cpu=not torch.cuda.is_available(),
            dataloader_drop_last=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Inputs(inputs.cpu()))
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_LossBar(title))
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    model.to(inputs.device).eval()
    return Curve([e["step"] for e in entries], [float(e["loss"]) for e in entries])
