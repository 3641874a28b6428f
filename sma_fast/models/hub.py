"""Saving and loading of models: config.json and model.safetensors in a folder or on the hub."""

from typing import Any

import torch
from torch import nn

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError as error:
    _REASON = str(error)

    class PyTorchModelHubMixin:
        """Takes the place of huggingface_hub's mixin where that is not installed."""

        def save_pretrained(self, *_: Any, **__: Any) -> None:
            raise ImportError(f"save_pretrained: {_REASON}: pip install 'sma_fast[train]'")

        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> "PyTorchModelHubMixin":
            raise ImportError(f"from_pretrained: {_REASON}: pip install 'sma_fast[train]'")


class HubModel(PyTorchModelHubMixin):
    """A model with `save_pretrained(folder)` and `from_pretrained(folder or hub name)`.

    Loading takes safetensors only, and all of a checkpoint or nothing.
    """

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


__all__ = ["HubModel"]
