"""transformers.Trainer with what SMA adds.

Progress of annealing; draws and losses that do not depend on how a step is cut into batches; equal
masks in validation; checkpoints that are either whole or passed over.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from sma_fast import _draws
from sma_fast.masking.sma import SMAMasking
from sma_fast.models import SMAForPretraining
from sma_fast.training import checkpoints
from sma_fast.training.callbacks import STAGES, Annealing, LossBar, Speed
from sma_fast.training.data import pad_batch

WEIGHTS = "model.safetensors"
EVALUATION_SEED = 0  # of the masks that a validation loss is taken over


class SMATrainer(Trainer):
    """Trains a model with `num_targets`, whose output has `.loss`, and for labels `.logits`.

    A step means the same in one batch, in several accumulated ones and in several processes: each
    row draws its masks from the seed, the step and its place in the step; all rows are padded
    alike; the loss is a mean over all masked tokens, or known labels, of the step. Only dropout
    differs, whose seed belongs to a batch.

    Args:
        save_beside: called with the folder of each checkpoint, to put more files there.
        title: of the progress bar.
        keep_checkpoints: all of them, not only the last two and the best one.
        arguments: of transformers.Trainer.
    """

    def __init__(
        self,
        *arguments: object,
        save_beside: Callable[[Path], object] | None = None,
        title: str = "",
        keep_checkpoints: bool = False,
        **named: object,
    ) -> None:
        logging.set_verbosity_error()
        super().__init__(*arguments, **named)
        self._kind, self._config = type(self.model), getattr(self.model, "config", None)
        self.save_beside, self.keep_checkpoints = save_beside, keep_checkpoints
        for printing in (ProgressCallback, PrinterCallback):
            self.remove_callback(printing)
        self.add_callback(Speed())
        if self.args.should_save and not self.args.disable_tqdm:
            self.add_callback(LossBar(title, lambda: self.speed))
        self.add_callback(Annealing(self.model, staged=self.args.torch_compile))
        self.unwrapped = self.model  # before DDP, FSDP or torch.compile
        if self.args.torch_compile:  # stages of annealing, of rows of one length and of any
            torch._dynamo.config.recompile_limit = max(
                torch._dynamo.config.recompile_limit, 4 * (STAGES + 1)
            )
        self._num_targets = self.model.num_targets
        self._in_step: torch.Tensor | None = None  # targets of all batches; None with one batch
        self._batch = (-1, 0)  # step, and batches of it that were seen
        self._rows_evaluated = 0  # by all processes, in this evaluation
        self._sums: dict[str, torch.Tensor] = {}  # (2,) by name: of losses and of targets in it

    @property
    def speed(self) -> Speed:
        """What takes the time; a resumed run has another one than it began with."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, Speed))

    def _get_train_sampler(self, train_dataset: torch.utils.data.Dataset | None = None):
        # whole steps only, so that an epoch does not depend on how a step is cut into batches
        rows = self.train_dataset if train_dataset is None else train_dataset
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        step *= self.args.world_size
        return torch.utils.data.RandomSampler(rows, num_samples=len(rows) // step * step)

    def _get_dataloader(self, *arguments: object, is_training: bool = False, **named: object):
        # training leaves the last incomplete batch out, and evaluation must not
        before = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = before and is_training
        try:
            return super()._get_dataloader(*arguments, is_training=is_training, **named)
        finally:
            self.args.dataloader_drop_last = before

    def train(self, *arguments: object, **named: object) -> object:
        try:
            return super().train(*arguments, **named)
        except BaseException:
            for bar in self.callback_handler.callbacks:
                if isinstance(bar, LossBar):
                    bar.close()  # a message begins on a line of its own
            raise

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict], None]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._in_step = None
        if len(batches) > 1 or self.args.world_size > 1:
            batches = self._padded_alike(batches)
            targets = sum(self._num_targets(**batch) for batch in batches)
            self._in_step = self.accelerator.gather(targets.reshape(1)).sum()
        return batches, None

    def _get_num_items_in_batch(self, *_: object) -> None:
        return None  # counted above

    def log(self, logs: dict[str, float], *arguments: object, **named: object) -> None:
        if "loss" in logs:
            logs = logs | getattr(self.unwrapped, "to_log", dict)()
        super().log(logs, *arguments, **named)

    def training_step(self, model: nn.Module, inputs: dict, *arguments: object) -> torch.Tensor:
        step = self.state.global_step
        number = self._batch[1] if self._batch[0] == step else 0
        self._batch = (step, number + 1)
        place = number * self.args.world_size + self.args.process_index
        # of dropout: the same in a resumed run, and for two processes or two accumulated batches
        torch.manual_seed(_seed(self.args.seed, step, place))
        rows = len(inputs["inputs"])
        with self._draws_of(_seed(self.args.seed, step), place * rows, rows):
            return super().training_step(model, inputs, *arguments)

    def _draws_of(self, seed: int, first: int, rows: int) -> contextlib.AbstractContextManager:
        return _draws.by_row(torch.arange(first, first + rows, device=self.args.device) + seed)

    def _padded_alike(self, batches: list[dict]) -> list[dict]:
        # to the longest row of all, in all processes: published masking draws in proportion to it
        if batches[0]["inputs"].is_floating_point():
            return batches  # rows of a table and pictures have one length
        lengths = [batch["inputs"].shape[1] for batch in batches]
        own = torch.tensor([max(lengths)], device=self.args.device)
        longest = int(self.accelerator.gather(own).max())
        return [pad_batch(batch, longest) for batch in batches]

    def _track_num_input_tokens(self, inputs: dict) -> None:
        # a token of several channels is one token, which the Trainer does not know
        valid = inputs.get("attention_mask")
        tokens = inputs["inputs"].shape[:2].numel() if valid is None else int(valid.sum())
        tokens //= getattr(self.unwrapped, "pixels_per_token", 1)
        number = torch.tensor(tokens, device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(number).sum())

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, **_: object
    ) -> object:
        output = model(**inputs)
        loss = output.loss
        if self._in_step is not None:
            # the Trainer divides by the number of batches and takes the mean over processes
            batches = self.current_gradient_accumulation_steps * self.args.world_size
            loss = loss * (self._num_targets(**inputs) * batches / self._in_step.clamp(min=1))
        return (loss, output) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple:
        (inputs,) = self._padded_alike([self._prepare_inputs(inputs)])
        labels, rows = inputs.get("labels"), len(inputs["inputs"])
        inputs = self._without_fillers(inputs)
        if self.args.torch_compile and not self.is_fsdp_enabled:
            model = self.unwrapped  # a few batches with other masks: not worth compiling for
        first = self._rows_evaluated + self.args.process_index * rows
        self._rows_evaluated += self.args.world_size * rows
        output = None
        for name, masking in self._maskings().items():
            if masking is not None:
                self.unwrapped.masking = masking
            with (
                torch.no_grad(),
                self._draws_of(_seed(EVALUATION_SEED), first, rows),
                self.compute_loss_context_manager(),
            ):
                found = model(**inputs)
            output = output or found
            targets = self._num_targets(**inputs)
            loss = torch.where(targets > 0, found.loss.double() * targets, 0.0)
            self._sums[name] = self._sums.get(name, 0.0) + torch.stack([loss, targets])
        if prediction_loss_only or labels is None:
            return output.loss, None, None
        return output.loss, output.logits.float(), labels

    def _maskings(self) -> dict[str, SMAMasking | None]:
        # a guided mask changes with the model: the loss under random ones is of the same tokens
        if not isinstance(self.unwrapped, SMAForPretraining):
            return {"loss": None}
        masking = self.unwrapped.config.masking
        if masking.mask == "random":
            return {"loss": masking}
        config = self.unwrapped.config
        guided = masking
        if config.encoder_type == "cross_attention":  # as many queries whatever the batch's length
            length, latents = config.max_position_embeddings, config.num_latents
            guided = dataclasses.replace(
                masking, num_queries=masking.count_queries(length, latents)
            )
        return {"loss": dataclasses.replace(masking, mask="random"), "guided_loss": guided}

    def _without_fillers(self, inputs: dict) -> dict:
        # several processes fill up the last batch with rows of the first, which must not count
        state, rows = self.accelerator.gradient_state, len(inputs["inputs"])
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder < 1:
            return inputs
        counted = state.remainder - self.args.process_index * rows
        filler = torch.arange(rows, device=self.args.device) >= counted
        if "labels" in inputs:
            unknown = math.nan if inputs["labels"].is_floating_point() else -100
            labels = inputs["labels"].clone()
            labels[filler] = unknown
            return {**inputs, "labels": labels}
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones(inputs["inputs"].shape[:2], dtype=torch.long, device=filler.device)
        return {**inputs, "attention_mask": mask * ~filler.unsqueeze(1)}

    def evaluation_loop(self, *arguments: object, **named: object) -> EvalLoopOutput:
        # the same masks each time, so that losses compare; training's draws go on as if nothing was
        model = self.unwrapped
        progress, devices = getattr(model, "progress", 1.0), []
        if torch.cuda.is_available():
            devices = [torch.cuda.current_device()]
        self._rows_evaluated, self._sums = 0, {}
        with torch.random.fork_rng(devices):
            torch.manual_seed(EVALUATION_SEED)
            model.progress = 1.0
            try:
                result = super().evaluation_loop(*arguments, **named)
            finally:
                model.progress = progress
                if isinstance(model, SMAForPretraining):
                    model.masking = None
        prefix = named.get("metric_key_prefix", "eval")
        for name, sums in self._sums.items():  # not a mean of batches' means
            total, targets = self.accelerator.gather(sums.unsqueeze(0)).sum(dim=0).tolist()
            result.metrics[f"{prefix}_{name}"] = total / max(targets, 1)
        return result

    def is_over(self, folder: Path) -> bool:
        """Returns whether a checkpoint is of a run's last step; then its result is taken over.

        Args:
            folder: of a whole checkpoint.
        """
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        control = state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
        if state.global_step < self.args.max_steps and not control.get("should_training_stop"):
            return False
        self.state = state
        vars(self.speed).update(state.stateful_callbacks.get("Speed", {}).get("attributes", {}))
        if self.args.load_best_model_at_end and state.best_global_step:
            folder = folder.parent / f"checkpoint-{state.best_global_step}"
        checkpoints.check(folder)
        load_weights(self.model, folder)
        return True

    def _save_checkpoint(self, *arguments: object, **named: object) -> None:
        run = Path(self.args.output_dir)
        folder = run / f"checkpoint-{self.state.global_step}"
        with checkpoints.writing(folder):
            super()._save_checkpoint(*arguments, **named)
        self.accelerator.wait_for_everyone()  # each process writes files of its own
        if self.is_world_process_zero():
            with checkpoints.writing(folder):
                checkpoints.mark_complete(folder)
            if not self.keep_checkpoints:
                checkpoints.remove_old(run, self.state.best_global_step)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if state_dict is None:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        else:  # of FSDP, gathered from all shards
            model = self._kind(self._config)
            model.load_state_dict(state_dict)
        model.save_pretrained(folder)
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
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        checkpoints.check(best)
        if self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            load_weights(self.model, best)


def _seed(*words: int) -> int:
    # an int64 from a few numbers, another one for other numbers: zeros behind count, too
    state = np.random.SeedSequence([len(words), *words]).generate_state(2)
    return int(state[0]) << 31 ^ int(state[1])


def load_weights(model: nn.Module, folder: Path) -> None:
    """Loads model.safetensors of a checkpoint into `model`, all of it and nothing else.

    Args:
        model: one with `parts` has a file for each of them.
        folder: of the checkpoint.

    Raises:
        CheckpointError: where the file is missing, damaged, or of another model.
    """
    with contextlib.suppress(AttributeError):  # torch.compile's wrapper
        model = model._orig_mod
    parts = model.parts() if hasattr(model, "parts") else {WEIGHTS: model}
    for name, part in parts.items():
        _load_file(part, folder / name)


def _load_file(model: nn.Module, file: Path) -> None:
    try:
        safetensors.torch.load_model(model, file, strict=True)
    except FileNotFoundError:
        raise checkpoints.CheckpointError(
            f"{file}: is missing: name a folder that training wrote"
        ) from None
    except (safetensors.SafetensorError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise checkpoints.CheckpointError(
            f"{file}: is of another model, or damaged ({reason}): name the folder of this run, or "
            "start again in another one"
        ) from None


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
        "save_total_limit": None,  # checkpoints.remove_old removes them
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "include_num_input_tokens_seen": "non_padding",
        "ddp_find_unused_parameters": False,
        "restore_callback_states_from_checkpoint": True,  # how long there was no better one
    }
    return TrainingArguments(**(defaults | settings))
