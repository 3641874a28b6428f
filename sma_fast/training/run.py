"""pretrain, finetune, evaluate: rows in, a trained model and its results out.

A run's folder holds checkpoints while it trains, and at the end the model (config.json,
model.safetensors), the encodings its inputs need (data.json), what was asked for (run.json) and
what came out (results.json).
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch

from sma_fast.masking.random import RandomMasking
from sma_fast.models import MAEForPretraining, SMAConfig, SMAForPrediction, SMAForPretraining
from sma_fast.training import checkpoints, metrics
from sma_fast.training.callbacks import Curves
from sma_fast.training.damaged import WholePictures
from sma_fast.training.data import Collator, Examples
from sma_fast.training.extras import require
from sma_fast.training.inputs import (
    ENCODINGS,
    Encodings,
    Inputs,
    RunError,
    check_options,
    drawn_rows,
    encoded,
    fit_inputs,
    fit_labels,
    known_inputs,
    open_parts,
    rows_to_read,
)
from sma_fast.training.mae import MAETraining
from sma_fast.training.mae_presets import mae_policy
from sma_fast.training.options import TASKS, DataOptions, TrainOptions
from sma_fast.training.pretrained import (
    holds_mae,
    load_model,
    load_pretrained,
    only_saved,
    open_pretrained,
)
from sma_fast.training.start import say, starting_point
from sma_fast.training.trainer import SMATrainer, training_arguments

_RESULTS = "results.json"


def pretrain(options: TrainOptions, data: DataOptions) -> dict[str, Any]:
    """Pretrains a model and returns what results.json holds.

    The last weights are kept: no loss of masked tokens says how well a model will be fine-tuned.

    Args:
        options: how to train.
        data: what on; without a validation part there is no validation loss. It is taken under
            random masks, the same for all checkpoints, and under guided ones beside.

    Raises:
        RunError, DataError, CheckpointError, ValueError: saying what to do.
    """
    if options.tensorboard:
        require("tensorboard")
    options.check()  # options that do not go together are refused before data are read
    check_options(ENCODINGS[options.start().encoding], data)
    if options.patience:
        raise RunError("patience: allowed in fine-tuning only: pretraining keeps its last weights")
    start = starting_point(options, data, "pretrain")
    whole = WholePictures(data)
    parts = open_parts(data, chosen=whole)
    train = _train_part(parts, options, data)
    encodings = Encodings(fit_inputs(options.start().encoding, train, data, options.config()))
    examples = encoded(parts | {"train": train}, encodings)
    if start is not None:
        encodings.check_unchanged(start, examples)
    torch.manual_seed(options.seed)
    if options.kind == "mae":
        model = _mae(options, examples["train"], start)
    else:
        model = SMAForPretraining(_config(options, encodings.inputs))
    trainer = _trainer(model, options, examples, encodings, finetuning=False)
    return _train(trainer, options, encodings, start, whole.counted(), lambda: {})


def finetune(
    options: TrainOptions,
    data: DataOptions,
    labels: tuple[str, ...],
    task: str,
    pretrained: Path | None = None,
) -> dict[str, Any]:
    """Trains a model to predict labels and returns what results.json holds.

    The best checkpoint is chosen on the validation part; the test part, where there is one, is
    looked at once, at the end.

    Args:
        options: how to train.
        data: what on.
        labels: columns to predict.
        task: "classification", "multilabel" or "regression".
        pretrained: folder of a pretrained model, of `pretrain` or of `save_pretrained` alone;
            inputs are encoded as there, or, where nothing says how, as the preset does. Default:
            none, a new model of the preset.

    Raises:
        RunError, DataError, CheckpointError, ValueError: saying what to do.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, allowed is {', '.join(TASKS)}")
    if task == "classification" and len(labels) != 1:
        raise ValueError(f"labels: got {len(labels)} columns, allowed is 1 for classification")
    if options.tensorboard:
        require("tensorboard")
    options.check()
    if options.kind != "sma":
        raise RunError(f"kind: got {options.kind!r}, allowed is sma in fine-tuning")
    if options.masking:
        raise RunError("masking: allowed in pretraining only: fine-tuning masks nothing")
    check_options(ENCODINGS[options.start().encoding], data)
    source, known = (None, None) if pretrained is None else load_pretrained(pretrained)
    expected = ENCODINGS[options.start().encoding]
    if source is not None and (
        source.config.input_type != expected.input_type or not isinstance(known, expected | None)
    ):
        raise RunError(
            f"preset: got {options.preset!r}, allowed is the one that {pretrained} was pretrained "
            "with"
        )
    if source is not None:
        _check_changes(source.config, options.model)
    start = starting_point(options, data, f"finetune {task} {labels} {pretrained}")
    if known is not None:
        known = known_inputs(known, data)
        read = sorted(set(labels) & set(known.columns))
        if read:
            raise RunError(
                f"labels: {pretrained} reads {', '.join(read)} as input, which gives the answer "
                f"away: pretrain again with --exclude {' '.join(read)}"
            )
    whole = WholePictures(data)
    parts = open_parts(data, labels, whole)
    train = _train_part(parts, options, data)
    if known is None:
        config = options.config() if source is None else source.config
        known = fit_inputs(options.start().encoding, train, data, config, labels)
    encodings = Encodings(known, fit_labels(task, train, labels))
    examples = encoded(parts | {"train": train}, encodings)
    if start is not None:
        encodings.check_unchanged(start, examples)
    changes = {
        "num_labels": encodings.labels.num_labels,
        "problem_type": TASKS[task],
        **options.start().dropout,
    }
    torch.manual_seed(options.seed)
    if source is None:
        model = SMAForPrediction(_config(options, encodings.inputs, changes))
    else:
        _check_size(source.config, encodings.inputs)
        model = SMAForPrediction.from_pretraining(source, **{**changes, **options.model})
    trainer = _trainer(model, options, examples, encodings, finetuning=True)

    def on_test() -> dict[str, Any]:
        if "test" not in examples:
            return {}
        output = trainer.predict(examples["test"], metric_key_prefix="test")
        return {"test": metrics.scores(task, output.predictions, output.label_ids, encodings)}

    return _train(trainer, options, encodings, start, {"task": task, **whole.counted()}, on_test)


def evaluate(folder: Path, data: DataOptions, batch_size: int = 64) -> dict[str, Any]:
    """Returns the scores of a fine-tuned model, or the losses of a pretrained one, on all rows.

    "loss" is under random masks, which are the same for every model of that data and ratio;
    "guided_loss" under those that the model itself guides, where it was trained with such.

    Args:
        folder: that `finetune` or `pretrain` wrote.
        data: where the rows are: the test part with `split_column`, `test_share`, a `test` source
            or splits of its own, which has to be as in training; otherwise all.
        batch_size: samples at a time.

    Raises:
        RunError, DataError, CheckpointError: saying what to do.
    """
    mae = holds_mae(folder)
    known = None if only_saved(folder) and not mae else Encodings.read(folder)
    whole = WholePictures(data)
    if mae:
        model = MAETraining(load_model(folder, MAEForPretraining), RandomMasking())
        encodings = Encodings(known_inputs(known.inputs, data))
        rows = rows_to_read(data, whole)
    elif known is None or known.labels is None:
        model, inputs, rows = open_pretrained(folder, data, chosen=whole)
        encodings = Encodings(inputs)
    else:
        model = load_model(folder, SMAForPrediction)
        encodings = dataclasses.replace(known, inputs=known_inputs(known.inputs, data))
        rows = rows_to_read(data, whole)
    examples = encoded({"rows": rows}, encodings)
    with tempfile.TemporaryDirectory(prefix="sma_fast-") as scratch:  # the Trainer wants one
        arguments = training_arguments(
            Path(scratch), per_device_eval_batch_size=batch_size, disable_tqdm=True
        )
        trainer = SMATrainer(model, arguments, data_collator=Collator())
        if encodings.labels is None:
            return _losses(trainer.evaluate(examples["rows"])) | whole.counted()
        output = trainer.predict(examples["rows"])
    task = {kind: task for task, kind in TASKS.items()}[model.config.problem_type]
    return metrics.scores(task, output.predictions, output.label_ids, encodings) | whole.counted()


def _train_part(
    parts: Mapping[str, datasets.Dataset], options: TrainOptions, data: DataOptions
) -> datasets.Dataset:
    if "train" not in parts:
        raise RunError(
            f"split_column: got {data.split_column or 'split'!r}, which has no train part ("
            f"{', '.join(parts)}): name it with --split-column and --parts train=VALUE"
        )
    return drawn_rows(parts["train"], options.limit_train, data.split_seed)


def _mae(options: TrainOptions, train: Examples, start: Path | None) -> MAETraining:
    config = options.config()
    model = MAEForPretraining(config)
    policy = mae_policy(options.mask, config, options.masking, options.out, len(train))
    training = MAETraining(model, policy, options.augment or "flip")
    with checkpoints.writing(options.out):
        training.prepare_table(start)
    train.numbered = getattr(policy, "table", None) is not None
    return training


def _config(
    options: TrainOptions,
    inputs: Inputs,
    changes: Mapping[str, Any] | None = None,
) -> SMAConfig:
    sizes: dict[str, Any] = {}
    if inputs.input_type == "continuous":
        sizes |= {"input_channels": inputs.channels, "max_position_embeddings": inputs.max_length}
    config = options.config({**sizes, **(changes or {})})
    _check_size(config, inputs)
    return config


def _check_changes(config: SMAConfig, changes: Mapping[str, Any]) -> None:
    # the pretrained encoder stays what it is
    free = ("attention_dropout_prob", "hidden_dropout_prob", "drop_path_prob")
    for name, value in changes.items():
        if name in free or name.startswith("decoder_") or getattr(config, name) == value:
            continue
        raise RunError(
            f"{name}: got {value!r}, allowed is {getattr(config, name)!r}, that of the pretrained "
            f"model, of which {', '.join(free)} and what begins with decoder_ may be changed"
        )


def _check_size(config: SMAConfig, inputs: Inputs) -> None:
    if config.max_position_embeddings < inputs.max_length:
        raise RunError(
            f"max_position_embeddings: got {config.max_position_embeddings}, allowed is at least "
            f"{inputs.max_length}, the tokens of a row: leave it to the data"
        )
    if inputs.input_type == "continuous" and config.input_channels != inputs.channels:
        raise RunError(
            f"input_channels: got {config.input_channels}, allowed is {inputs.channels}, those of "
            "the data"
        )


def _trainer(
    model: SMAForPretraining | SMAForPrediction | MAETraining,
    options: TrainOptions,
    examples: Mapping[str, Examples],
    encodings: Encodings,
    finetuning: bool,
) -> SMATrainer:
    schedule = options.schedule(finetuning)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    share, rest = divmod(schedule.batch_size, processes * options.accumulate)
    if rest or not share:
        raise RunError(
            f"batch_size: got {schedule.batch_size}, allowed is a multiple of {processes} "
            f"processes x {options.accumulate} accumulated batches"
        )
    if len(examples["train"]) < schedule.batch_size:
        raise RunError(
            f"batch_size: got {schedule.batch_size}, allowed is at most "
            f"{len(examples['train'])}, the rows of the train part"
        )
    in_epoch = len(examples["train"]) // schedule.batch_size
    steps = options.steps or max(1, round(schedule.epochs * in_epoch))
    saving = min(options.save_steps or max(1, steps // 10), steps)
    warmup = schedule.warmup_steps
    if schedule.warmup_share is not None:
        warmup = round(schedule.warmup_share * steps)
    elif options.warmup_steps is None:
        warmup = min(warmup, steps // 5)  # the preset's is for longer runs
        if warmup < schedule.warmup_steps:
            say(f"warm-up: {warmup} steps, a fifth of the run, not {schedule.warmup_steps}")
    validated = "valid" in examples
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": share,
        "per_device_eval_batch_size": share,
        "gradient_accumulation_steps": options.accumulate,
        "learning_rate": schedule.learning_rate,
        "weight_decay": schedule.weight_decay,
        "adam_beta2": schedule.adam_beta2,
        "warmup_steps": warmup,
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(
            schedule.scheduler, schedule.scheduler
        ),
        "seed": options.seed,
        "data_seed": options.seed,
        "dataloader_drop_last": True,
        "dataloader_num_workers": options.workers,
        "logging_steps": max(1, min(50, steps // 20)),
        "save_strategy": "steps",
        "save_steps": saving,
        "eval_strategy": "steps" if validated else "no",
        "eval_steps": saving,
        "bf16": options.bf16,
        "torch_compile": options.compile,
        "disable_tqdm": not options.progress_bar,
    }
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if options.fsdp:
        settings["fsdp"] = options.fsdp
    if validated and finetuning:  # a pretrained model is its last one: see README
        settings |= {
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
    if options.patience and not validated:
        raise RunError("patience: allowed with a validation part only")
    callbacks = [Curves()] if options.tensorboard else []
    if options.patience:
        from transformers import EarlyStoppingCallback

        callbacks.append(EarlyStoppingCallback(options.patience))
    return SMATrainer(
        model,
        training_arguments(options.out, **settings),
        data_collator=Collator(),
        train_dataset=examples["train"],
        eval_dataset=examples.get("valid"),
        callbacks=callbacks,
        keep_checkpoints=options.keep_checkpoints,
        save_beside=lambda folder: encodings.save(folder, examples),
        title="fine-tuning" if finetuning else f"pretraining, {options.mask} masks",
    )


def _train(
    trainer: SMATrainer,
    options: TrainOptions,
    encodings: Encodings,
    start: Path | None,
    more: Mapping[str, Any],
    on_test: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    if start is None or not trainer.is_over(start):
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
    elif checkpoints.is_whole(options.out) and (options.out / _RESULTS).is_file():
        return json.loads((options.out / _RESULTS).read_text())
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    at_random = [entry["random_masks"] for entry in history if "random_masks" in entry]
    validation = [
        {"step": entry["step"], **_losses(entry)} for entry in history if "eval_loss" in entry
    ]
    results = {
        **more,
        "steps": trainer.state.global_step,
        "seconds": trainer.speed.total_seconds,
        "tokens_per_second": trainer.speed.tokens_per_second,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "loss": losses[-1] if losses else None,
        **({"random_masks": at_random[-1]} if at_random else {}),
        "validation": validation,
        "best_step": trainer.state.best_global_step,
        **on_test(),
    }
    with checkpoints.writing(options.out):
        if trainer.is_world_process_zero():
            (options.out / checkpoints.COMPLETE).unlink(missing_ok=True)
        trainer.save_model(str(options.out))  # by all processes: with FSDP each has a part
        if trainer.is_world_process_zero():
            (options.out / _RESULTS).write_text(json.dumps(results, indent=1) + "\n")
            checkpoints.mark_complete(options.out)
    return results


def _losses(entry: Mapping[str, float]) -> dict[str, float]:
    names = ("loss", "guided_loss")
    return {name: entry[f"eval_{name}"] for name in names if f"eval_{name}" in entry}
