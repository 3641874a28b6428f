"""transformers.Trainer with what SMA adds.

Progress of annealing; draws and losses that do not depend on how a step is cut into batches; equal
masks in validation; checkpoints that are either whole or passed over.
"""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import safetensors.torch  # noqa: E402
from transformers import (  # noqa: E402
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback  # noqa: E402
from transformers.trainer_callback import ExportableState  # noqa: E402
from transformers.trainer_utils import EvalLoopOutput  # noqa: E402
from transformers.utils import logging  # noqa: E402

from sma_fast import _draws  # noqa: E402
from sma_fast.masking.sma import SMAMasking  # noqa: E402
from sma_fast.models import SMAForPretraining  # noqa: E402
from sma_fast.training import checkpoints  # noqa: E402
from sma_fast.training.data import pad_batch  # noqa: E402

WEIGHTS = "model.safetensors"
EVALUATION_SEED = 0  # of the masks that a validation loss is taken over
STAGES = 4  # of annealing under torch.compile, which compiles a step for each, and keeps 8 at most


class Speed(TrainerCallback, ExportableState):
    """Takes the time of a run, over all its sessions; checkpoints keep it.

    Attributes:
        tokens: of the steps so far, over all processes.
        seconds: of these steps with the reading of their data, without evaluation and saving.
        before: seconds that earlier sessions took in all.
    """

    def __init__(self) -> None:
        self.tokens, self.seconds, self.before = 0, 0.0, 0.0
        self._seen, self._last, self._began = 0, 0.0, None

    @property
    def tokens_per_second(self) -> float | None:
        """Of training steps; None before the first."""
        return self.tokens / self.seconds if self.seconds else None

    @property
    def total_seconds(self) -> float:
        """Of the whole run, evaluation and saving included."""
        return self.before + (0 if self._began is None else time.perf_counter() - self._began)

    def state(self) -> dict:
        kept = {"tokens": self.tokens, "seconds": self.seconds, "before": self.total_seconds}
        return {"args": {}, "attributes": kept}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._seen, self._last = state.num_input_tokens_seen, time.perf_counter()
        self._began = self._last

    def on_step_end(self, args, state, control, **kwargs) -> None:
        now = time.perf_counter()
        self.seconds, self._last = self.seconds + now - self._last, now
        self.tokens += state.num_input_tokens_seen - self._seen
        self._seen = state.num_input_tokens_seen

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self._last = time.perf_counter()

    def on_save(self, args, state, control, **kwargs) -> None:
        self._last = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.before, self._began = self.total_seconds, None


class LossBar(ProgressCallback):
    """The Trainer's progress bar with loss and tokens/s beside it, not one line for each entry.

    Args:
        title: what stands before the bar.
        speed: returns what measures the tokens/s. Default: they are not shown.
    """

    def __init__(self, title: str = "", speed: Callable[[], Speed] | None = None) -> None:
        super().__init__()
        self.title = title
        self.speed = speed

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def close(self) -> None:
        """Ends the bars where they are."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.training_bar is None or "loss" not in logs:
            return
        shown = {"loss": f"{float(logs['loss']):.4f}"}
        if self.speed is not None and self.speed().tokens_per_second is not None:
            shown["tokens/s"] = f"{self.speed().tokens_per_second:.3g}"
        self.training_bar.set_postfix(**shown)


class Curves(TensorBoardCallback):
    """Losses and learning rate for TensorBoard, without the model's config, which has no text."""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        super().on_train_begin(args, state, control, **kwargs)


class Annealing(TrainerCallback):
    """Tells the model how far training is, and has each checkpoint begin with a new mean of losses.

    Args:
        model: before anything is wrapped around it.
        staged: whether progress goes in `STAGES` stages.
    """

    def __init__(self, model: nn.Module, staged: bool = False) -> None:
        self.model = model
        self.staged = staged

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        progress = state.global_step / max(state.max_steps, 1)
        if self.staged:
            progress = stage(progress, self.model.config.masking)
        self.model.progress = progress

    def on_step_end(self, args, state, control, **kwargs) -> None:
        # a resumed run does not know the losses since the last log entry
        control.should_log |= control.should_save

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.model.progress = 1.0


def stage(progress: float, masking: SMAMasking) -> float:
    """Returns `progress` rounded down to the begin of a stage of annealing; 1 where that is over.

    Args:
        progress: the share of training that is done, in [0, 1].
        masking: whose annealing it is.
    """
    if masking.mask == "random" or not masking.annealing(progress):
        return 1.0
    length = masking.schedule_length_ratio
    return math.floor(progress / length * STAGES) / STAGES * length


class SMATrainer(Trainer):
    """Trains a model with `num_targets`, whose output has `.loss`, and for labels `.logits`.

    A step means the same in one batch, in several accumulated ones and in several processes: each
    row draws its masks from the seed, the step and its place in the step; all rows are padded
    alike; the loss is a mean over all masked tokens, or known labels, of the step. Only dropout
    differs, whose seed belongs to a batch.

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
        self._kind, self._config = type(self.model), getattr(self.model, "config", None)
        self.save_beside = save_beside
        for printing in (ProgressCallback, PrinterCallback):
            self.remove_callback(printing)
        self.add_callback(Speed())
        if self.args.should_save and not self.args.disable_tqdm:
            self.add_callback(LossBar(title, lambda: self.speed))
        self.add_callback(Annealing(self.model, staged=self.args.torch_compile))
        self.unwrapped = self.model  # before DDP, FSDP or torch.compile
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
