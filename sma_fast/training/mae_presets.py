"""What a masked autoencoder of pictures starts from: MAE's settings, and a size for two cores.

Source: Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377), appendix A.1.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sma_fast import _check
from sma_fast.masking import POLICIES, picture_policy
from sma_fast.masking.score_table import check_table
from sma_fast.models import MAEConfig
from sma_fast.training.presets import Preset, Schedule

DEFAULT = "mae-32"
MASKS = tuple(POLICIES)
AUGMENTATIONS = ("flip", "crop", "none")
_NOT_HERE = {  # arguments of policies that something else decides
    "kind": "--mask attmask or attmask-hint",
    "width": "the model's",
    "pictures": "as many as the train part has",
}
_OWN = "*.json *.safetensors *.pt *.pth *.md training_args.bin checkpoint-* runs"  # of a run
# MAE's 1.5e-4 for each 256 pictures of a step, and 40 of 800 epochs of warm-up
_PUBLISHED = Schedule(4096, 2.4e-3, 0.05, 0, 800, warmup_share=0.05, adam_beta2=0.95)


@dataclasses.dataclass(frozen=True)
class MAEPreset(Preset):
    """One size of the model, with its schedule."""

    def config(self, changes: Mapping[str, Any], masking: Mapping[str, Any]) -> MAEConfig:
        """Returns the model's config.

        Args:
            changes: fields of MAEConfig that differ.
            masking: arguments of the policy, of which `mask_ratio` is the model's.

        Raises:
            TypeError, ValueError: for unknown fields, and values that do not go together.
        """
        changes = dict(changes)
        if masking.get("mask_ratio") is not None:
            ratio = masking["mask_ratio"]
            if changes.setdefault("mask_ratio", ratio) != ratio:
                raise ValueError(
                    f"mask_ratio: got {changes['mask_ratio']} of the model and {ratio} of the "
                    "mask, allowed is one of them"
                )
        return MAEConfig.preset(self.model["name"], **changes)


def _preset(name: str, schedule: Schedule) -> MAEPreset:
    return MAEPreset("pictures", {"name": name}, {}, schedule, schedule)


MAE_PRESETS = {
    "mae-32": _preset(  # (chosen), for two cores
        "mae-32", dataclasses.replace(_PUBLISHED, batch_size=256, learning_rate=1.5e-3, epochs=50)
    ),
    "mae-tiny": _preset("mae-tiny", _PUBLISHED),
    "mae-base": _preset("mae-base", _PUBLISHED),
    "mae-large": _preset("mae-large", _PUBLISHED),
}


def mae_preset(name: str, scale: str = "full") -> MAEPreset:
    """Returns a preset.

    Raises:
        ValueError: for an unknown name, and for a scale: names are sizes.
    """
    if name not in MAE_PRESETS:
        raise ValueError(
            f"preset: got {name!r}, allowed is {', '.join(MAE_PRESETS)} with --model mae"
        )
    if scale != "full":
        raise ValueError(f"scale: got {scale!r}, allowed is full with --model mae: take mae-32")
    return MAE_PRESETS[name]


def mae_policy(
    mask: str,
    config: MAEConfig,
    arguments: Mapping[str, Any],
    folder: Path | None = None,
    pictures: int | None = None,
) -> Any:
    """Returns what decides which patches are masked in training.

    Args:
        mask: one of `MASKS`.
        config: of the model.
        arguments: of the policy's class; `mask_ratio` is taken from `config`, and `table` is a file
            name in `folder`.
        folder: of the run. Default: the current one.
        pictures: of the train part, for a table of scores. Default: not known yet.

    Raises:
        ValueError: naming the argument, what was given and what is allowed.
    """
    for name, instead in _NOT_HERE.items():
        if name in arguments:
            raise ValueError(f"{name}: got {arguments[name]!r} in masking, allowed is {instead}")
    given = {name: value for name, value in arguments.items() if name != "mask_ratio"}
    try:
        _check_names(POLICIES[mask], given)
        if given.get("table") is not None:
            given |= {"table": _table(given["table"], folder or Path()), "pictures": pictures or 1}
        policy = picture_policy(mask, config, **given)
    except TypeError as error:
        raise ValueError(f"options of mask {mask!r}: {error}") from None
    _check.layer(getattr(policy, "layer", -1), config.num_hidden_layers)
    return policy


def _check_names(kind: type, given: Mapping[str, Any]) -> None:
    # before anything is made of the values
    allowed = [n for n in inspect.signature(kind).parameters if n not in _NOT_HERE]
    for name in given:
        if name not in allowed:
            raise TypeError(f"got {name!r}, allowed is {', '.join(allowed)}")


def _table(name: Any, folder: Path) -> Path:
    # a file of its own in the folder of the run: what else it named would be deleted
    allowed = "a bare file name in the run's folder, such as scores.bin"
    if not isinstance(name, str):
        raise ValueError(f"table: got {name!r}, allowed is {allowed}")
    bare = name == Path(name).name and not set(name) & set("\\:\0") and len(name.encode()) <= 200
    if not name or not bare or name.startswith("."):
        raise ValueError(f"table: got {name!r}, allowed is {allowed}: no path, no hidden file")
    if any(fnmatch(name.lower(), pattern) for pattern in _OWN.split()):
        raise ValueError(f"table: got {name!r}, the run's own, allowed is another: {allowed}")
    check_table(folder / name)
    return folder / name
