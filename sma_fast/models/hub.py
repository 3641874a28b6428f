"""Saving and loading of models: config.json and model.safetensors in a folder or on the hub."""

try:
    from huggingface_hub import PyTorchModelHubMixin as HubModel
except ImportError as error:
    _REASON = str(error)

    class HubModel:
        """Takes the place of huggingface_hub's mixin where that is not installed."""

        def save_pretrained(self, *_, **__) -> None:
            raise ImportError(f"save_pretrained: {_REASON}: pip install 'sma_fast[train]'")

        @classmethod
        def from_pretrained(cls, *_, **__) -> "HubModel":
            raise ImportError(f"from_pretrained: {_REASON}: pip install 'sma_fast[train]'")

        def __init_subclass__(cls, **_) -> None:
            super().__init_subclass__()


__all__ = ["HubModel"]
