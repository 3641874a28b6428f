"""Pretraining of the demo's model on a tensor of samples; `run.py` has the general one."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import ProgressCallback, Trainer
from transformers.utils import logging

from sma_fast.training.callbacks import LossBar
from sma_fast.training.trainer import training_arguments


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
        arguments = training_arguments(
            Path(scratch),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup_steps=steps // 10,
            seed=seed,
            data_seed=seed,
            logging_steps=max(1, steps // 50),
            save_strategy="no",
            disable_tqdm=False,
            dataloader_drop_last=True,
            include_num_input_tokens_seen="no",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Inputs(inputs.cpu()))
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LossBar(title))
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    model.to(inputs.device).eval()
    return Curve([e["step"] for e in entries], [float(e["loss"]) for e in entries])
