"""Small models and inputs for the tests of models."""

import torch

from sma_fast.masking.sma import SMAMasking
from sma_fast.models import SMAConfig, SMAForPretraining

KINDS = ("discrete", "continuous")
SELF = {"encoder_type": "self_attention", "embedded_channels": 16, "decoder_heads": 4}
ENCODERS = {"cross": {}, "self": SELF}


def config(kind: str = "discrete", **changes) -> SMAConfig:
    sizes = {
        "input_type": kind,
        "num_discrete_tokens": 20,
        "input_channels": 3,
        "max_position_embeddings": 32,
        "embedded_channels": 12,
        "num_latents": 6,
        "latent_channels": 16,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 2,
        "qk_channels": 8,
        "decoder_heads": 3,
        "initializer_range": 0.3,
        "pe_initializer_range": 0.3,
        "masking": SMAMasking(mask_ratio=0.4, num_queries=2),
    }
    return SMAConfig(**(sizes | changes))


def build(kind: str = "discrete", **changes) -> SMAForPretraining:
    torch.manual_seed(0)
    return SMAForPretraining(config(kind, **changes))


def sample(kind: str, batch: int = 4, tokens: int = 20) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    if kind == "discrete":
        return torch.randint(20, (batch, tokens), generator=rng)
    return torch.randn(batch, tokens, 3, generator=rng)


def lengths(*valid: int, tokens: int = 20) -> torch.Tensor:
    return (torch.arange(tokens) < torch.tensor(valid)[:, None]).long()


def random_mask(batch: int = 4, tokens: int = 20) -> torch.Tensor:
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(2)) < 0.4


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, scale: float | None = None) -> None:
    """1e-5 of the largest element expected."""
    scale = expected.abs().max().item() if scale is None else scale
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(scale, 1e-30))
