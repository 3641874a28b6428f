"""transformers.Trainer with what SMA adds: progress of annealing, equal masks in validation, and
checkpoints that are either whole or passed over."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import safetensors.torch  # noqa: E402
from transformers import (  # noqa: E402
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput  # noqa: E402
from transformers.utils import logging  # noqa: E402

from sma_fast.training import checkpoints  # noqa: E402

WEIGHTS = "model.safetensors"
EVALUATION_SEED = 0  # of the masks that a validation loss is taken over


class LossBar(ProgressCallback):
    """The Trainer's progress bar with loss and tokens/s beside it, not one line for each entry."""

    def __init__(self, title: str = "") -> None:
        super().__init__()
        self.title = title
        self.last = (0.0, 0)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.last = (time.perf_counter(), state.num_input_tokens_seen)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is None or "loss" not in logs:
            return
        shown = {"loss": f"{float(logs['loss']):.4f}"}
        now, tokens = time.perf_counter(), state.num_input_tokens_seen
        if tokens > self.last[1]:
            speed = (tokens - self.last[1]) / max(now - self.last[0], 1e-9)
            shown["tokens/s"] = f"{speed:.3g}"
        self.last = (now, tokens)
        self.training_bar.set_postfix(**shown)


class Annealing(TrainerCallback):
    """Tells the model how far training is."""

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        model.progress = state.global_step / max(state.max_steps, 1)

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        model.progress = 1.0


class KeepWhole(TrainerCallback):
    """Marks a checkpoint when it is whole, and only then removes older ones.

    Args:
        limit: checkpoints to keep, at least 1; the best one is kept besides.
    """

    def __init__(self, limit: int = 2) -> None:
        self.limit = limit

    def on_save(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        checkpoints.mark_complete(folder / f"checkpoint-{state.global_step}")
        best = state.best_model_checkpoint and Path(state.best_model_checkpoint).name
        for old in checkpoints.complete_ones(folder)[: -self.limit]:
            if old.name != best:
                shutil.rmtree(old)


class SMATrainer(Trainer):
    """Trains a model whose output has `.loss`, and for labelled data `.logits`.

    Args:
        save_beside: called with the folder of each checkpoint, to put more files there.
        title: of the progress bar.
        arguments: of transformers.Trainer.
    """

    def __init__(
        self,
        *arguments: object,
        save_beside: Callable[[Path], object] | None = None,
        title: str = "",
        **named: object,
    ) -> None:
        logging.set_verbosity_error()
        super().__init__(*arguments, **named)
        self.save_beside = save_beside
        for printing in (ProgressCallback, PrinterCallback):
            self.remove_callback(printing)
        if self.args.should_save and not self.args.disable_tqdm:
            self.add_callback(LossBar(title))
        self.add_callback(Annealing())
        self.add_callback(KeepWhole())

    def _get_dataloader(self, *arguments: object, is_training: bool = False, **named: object):
        # training leaves the last incomplete batch out, and evaluation must not
        before = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = before and is_training
        try:
            return super()._get_dataloader(*arguments, is_training=is_training, **named)
        finally:
            self.args.dataloader_drop_last = before

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, **_: object
    ) -> object:
        output = model(**inputs)
        return (output.loss, output) if return_outputs else output.loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs)
        loss = output.loss.detach()
        if prediction_loss_only or "labels" not in inputs:
            return loss, None, None
        return loss, output.logits.float(), inputs["labels"]

    def evaluation_loop(self, *arguments: object, **named: object) -> EvalLoopOutput:
        # the same masks each time, so that losses compare; training's draws go on as if nothing was
        model = self.accelerator.unwrap_model(self.model)
        progress, devices = getattr(model, "progress", 1.0), []
        if torch.cuda.is_available():
            devices = [torch.cuda.current_device()]
        with torch.random.fork_rng(devices):
            torch.manual_seed(EVALUATION_SEED)
            model.progress = 1.0
            try:
                return super().evaluation_loop(*arguments, **named)
            finally:
                model.progress = progress

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.save_pretrained(folder)
        if state_dict is not None and self.is_fsdp_enabled:  # gathered from all shards
            safetensors.torch.save_file(_once(state_dict), folder / WEIGHTS)
        if self.save_beside is not None:
            self.save_beside(folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(model or self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            load_weights(self.model, Path(self.state.best_model_checkpoint))


def load_weights(model: nn.Module, folder: Path) -> None:
    """Loads model.safetensors of a checkpoint into `model`, all of it and nothing else.

    Raises:
        CheckpointError: where the file is missing, damaged, or of another model.
    """
    with contextlib.suppress(AttributeError):  # torch.compile's wrapper
        model = model._orig_mod
    file = folder / WEIGHTS
    try:
        safetensors.torch.load_model(model, file, strict=True)
    except FileNotFoundError:
        raise checkpoints.CheckpointError(
            f"{file}: is missing: name a folder that training wrote"
        ) from None
    except (safetensors.SafetensorError, RuntimeError, OSError) as error:
        raise checkpoints.CheckpointError(
            f"{file}: cannot be loaded into this model: {error}"
        ) from None


def _once(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # safetensors takes no two names for one tensor
    seen: set[int] = set()
    kept = {}
    for name, value in state_dict.items():
        if value.data_ptr() not in seen or value.numel() == 0:
            seen.add(value.data_ptr())
            kept[name] = value.contiguous()
    return kept


def training_arguments(out: Path, **settings: object) -> TrainingArguments:
    """Returns arguments of the Trainer with this project's own defaults.

    Args:
        out: folder for checkpoints.
        settings: of transformers.TrainingArguments, stronger than the defaults.
    """
    defaults = {
        "output_dir": str(out),
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch_fused",
        "logging_nan_inf_filter": False,
        "log_level": "error",
        "save_total_limit": None,  # KeepWhole removes old ones
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "include_num_input_tokens_seen": "non_padding",
        "ddp_find_unused_parameters": False,
    }
    return TrainingArguments(**(defaults | settings))
