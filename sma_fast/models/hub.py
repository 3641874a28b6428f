"""Saving and loading of models: config.json and model.safetensors in a folder or on the hub."""

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

try:
    from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
except ImportError as error:
    _REASON = str(error)

    class PyTorchModelHubMixin:
        """Takes the place of huggingface_hub's mixin where that is not installed."""

        def __init_subclass__(cls, **_: Any) -> None:
            super().__init_subclass__()

        def save_pretrained(self, *_: Any, **__: Any) -> None:
            raise ImportError(f"save_pretrained: {_REASON}: pip install 'sma_fast[train]'")

        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> "PyTorchModelHubMixin":
            raise ImportError(f"from_pretrained: {_REASON}: pip install 'sma_fast[train]'")


CONFIG, WEIGHTS = "config.json", "model.safetensors"
_OF_HUB = {"force_download", "token", "cache_dir", "local_files_only", "revision"}


# README.md beside the weights; the mixin's own says that the model was pushed to the hub
_CARD = """---
{{ card_data }}
---

A model of the Python package `sma_fast`, with `config.json` (what it is) and `model.safetensors`
(its weights). The class of `sma_fast.models` that saved it loads it from this folder, or from its
name on the Hugging Face hub: `SMAForPretraining`, `SMAForPrediction` or `MAEForPretraining`, as in

    from sma_fast.models import MAEForPretraining

    model = MAEForPretraining.from_pretrained("FOLDER")
"""


class HubModel(PyTorchModelHubMixin, library_name="sma_fast", model_card_template=_CARD):
    """A model with `save_pretrained(folder)` and `from_pretrained(folder or hub name)`.

    Loading takes safetensors only, and all of a checkpoint or nothing.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **named: Any) -> "HubModel":
        """Returns the model that `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the Hugging Face hub.
            named: of huggingface_hub's ModelHubMixin.from_pretrained.

        Raises:
            ImportError: where huggingface_hub is not installed.
            ValueError: where there is no such model; says what there is.
        """
        if hasattr(PyTorchModelHubMixin, "_from_pretrained"):  # installed
            _check_source(cls, str(pretrained_model_name_or_path), named)
        return super().from_pretrained(pretrained_model_name_or_path, **named)

    @classmethod
    def _load_as_safetensor(
        cls, model: nn.Module, model_file: str, map_location: str, strict: bool
    ) -> nn.Module:
        from safetensors import SafetensorError
        from safetensors.torch import load_model

        try:
            load_model(model, model_file, strict=True, device=str(map_location))
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{model_file}: cannot be loaded into {cls.__name__}: {reason[:300]}"
            ) from None
        return model.to(torch.device(map_location))

    @classmethod
    def _load_as_pickle(cls, model: nn.Module, model_file: str, *_: Any) -> nn.Module:
        raise ValueError(f"{model_file}: is a pickle, allowed is model.safetensors")


def _check_source(kind: type, source: str, named: dict[str, Any]) -> None:
    allowed = f"a folder or hub name that holds what {kind.__name__}.save_pretrained wrote"
    folder, file = Path(source), Path(source) / CONFIG
    here = folder.is_dir()
    if not here:
        try:
            file = Path(
                hf_hub_download(source, CONFIG, **{n: named[n] for n in _OF_HUB & named.keys()})
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise _refused(source, f"no folder, and on the hub: {reason}", allowed) from None
    theirs = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        theirs = json.loads(file.read_text()).get("model_type")  # ours have none
    if theirs == "vit_mae" and hasattr(kind, "from_hugging_face"):
        allowed += (
            f"; take {kind.__name__}.from_hugging_face(transformers.ViTMAEForPreTraining"
            f".from_pretrained({source!r}))"
        )
    if theirs is not None:
        raise _refused(source, f"a model of transformers, {theirs!r}", allowed)
    for name in (CONFIG, WEIGHTS) if here else ():
        if not (folder / name).is_file() and not (name == CONFIG and "config" in named):
            raise _refused(source, f"a folder without {name}", allowed)


def _refused(source: str, what: str, allowed: str) -> ValueError:
    return ValueError(
        f"pretrained_model_name_or_path: got {source!r}, {what}, allowed is {allowed}"
    )


__all__ = ["HubModel"]
