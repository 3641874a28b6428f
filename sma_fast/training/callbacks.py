"""What the Trainer calls while it trains: the time a run takes, its bar and curves, annealing."""

import math
import time
from collections.abc import Callable

from torch import nn
from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState

from sma_fast.masking.sma import SMAMasking

STAGES = 4  # of annealing under torch.compile, which compiles a step for each


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
        masking = getattr(self.model.config, "masking", None)  # policies of pictures: not compiled
        if self.staged and masking is not None:
            progress = stage(progress, masking)
        self.model.progress = progress
        self.model.epoch = int(state.epoch or 0)

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
