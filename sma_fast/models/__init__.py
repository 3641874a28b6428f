"""Models over the ops: plain modules around F.scaled_dot_product_attention."""

from sma_fast.models.published import load_published
from sma_fast.models.sma import SMAForPrediction, SMAForPretraining
from sma_fast.models.sma_config import SMAConfig
from sma_fast.models.vit import MAEForPretraining
from sma_fast.models.vit_config import MAEConfig

__all__ = [
    "MAEConfig",
    "MAEForPretraining",
    "SMAConfig",
    "SMAForPrediction",
    "SMAForPretraining",
    "load_published",
]
