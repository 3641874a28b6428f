"""What SMA's encoder and decoder are made of: the attention layer and the embedding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sma_fast.models.sma_config import SMAConfig


class AttentionLayer(nn.Module):
    """Attention onto any keys and values, then an MLP, both pre-norm with a residual.

    In training each of the two branches is dropped for a whole sample with `drop_path_prob`.
    """

    def __init__(
        self,
        config: SMAConfig,
        width: int,
        kv_width: int,
        qk_channels: int,
        v_channels: int,
        heads: int,
        widening_factor: int,
        drop_path_prob: float = 0.0,
    ) -> None:
        super().__init__()
        bias = config.dense_use_bias
        self.heads = heads
        self.drop_path_prob = drop_path_prob
        self.attention_dropout = config.attention_dropout_prob
        self.query_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, qk_channels, bias=bias)
        self.key = nn.Linear(kv_width, qk_channels, bias=bias)
        self.value = nn.Linear(kv_width, v_channels, bias=bias)
        self.output = nn.Linear(v_channels, width, bias=bias)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, widening_factor * width, bias=bias),
            nn.GELU(),
            nn.Linear(widening_factor * width, width, bias=bias),
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def split(self, x: Tensor) -> Tensor:
        """(B, N, H D) -> (B, H, N, D), a view."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, attend: Tensor | None = None
    ) -> Tensor:
        """Returns (B, Q, C): `x` after attention and MLP.

        Args:
            x: (B or 1, Q, C), the residual.
            query: (B or 1, Q, qk_channels), projected.
            key: (B, N, qk_channels), projected.
            value: (B, N, v_channels), projected.
            attend: (B, N) bool, True = may be attended to. Default: all.
        """
        attended = F.scaled_dot_product_attention(
            self.split(query).expand(key.shape[0], -1, -1, -1),
            self.split(key),
            self.split(value),
            attn_mask=None if attend is None else attend[:, None, None, :],
            dropout_p=self.attention_dropout if self.training else 0.0,
        )  # (B, H, Q, D)
        x = x + self._drop_path(self.dropout(self.output(attended.transpose(1, 2).flatten(2))))
        return x + self._drop_path(self.dropout(self.mlp(self.mlp_norm(x))))

    def among(self, x: Tensor, attend: Tensor | None = None) -> Tensor:
        """Returns (B, N, C): self-attention, with queries, keys and values of the normalised `x`.

        Args:
            x: (B, N, C).
            attend: (B, N) bool, True = may be attended to. Default: all.
        """
        normed = self.query_norm(x)
        return self(x, self.query(normed), self.key(normed), self.value(normed), attend)

    def _drop_path(self, branch: Tensor) -> Tensor:
        # drops the whole branch of a sample, and scales up those that are kept
        if not self.training or self.drop_path_prob == 0:
            return branch
        keep = 1 - self.drop_path_prob
        kept = torch.rand((branch.shape[0], 1, 1), device=branch.device) < keep
        return branch * (kept / keep).to(branch.dtype)


class SMAEmbedding(nn.Module):
    """Tokens or values plus learned positions, normalised: (B, N) or (B, N, channels) -> E."""

    def __init__(self, config: SMAConfig) -> None:
        super().__init__()
        width = config.embedded_channels
        self.discrete = config.input_type == "discrete"
        if self.discrete:
            self.tokens = nn.Embedding(config.num_discrete_tokens, width)
        else:
            self.tokens = nn.Linear(config.input_channels, width)
        self.positions = nn.Embedding(config.max_position_embeddings, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, inputs: Tensor) -> Tensor:
        self._check(inputs)
        embedding = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        return self.dropout(self.norm(embedding))

    def _check(self, inputs: Tensor) -> None:
        longest = self.positions.num_embeddings
        if self.discrete:
            if inputs.dim() != 2 or inputs.is_floating_point() or inputs.dtype == torch.bool:
                raise ValueError(
                    f"inputs: got {inputs.dtype} of shape {tuple(inputs.shape)}, allowed is (B, N) "
                    "integer token ids"
                )
            known = self.tokens.num_embeddings
            if inputs.device.type == "cpu" and not torch.compiler.is_compiling() and inputs.numel():
                least, most = (int(x) for x in inputs.aminmax())
                if least < 0 or most >= known:
                    raise ValueError(
                        f"inputs: holds {least} to {most}, allowed is 0 to {known - 1}"
                    )
        else:
            channels = self.tokens.in_features
            if inputs.dim() != 3 or inputs.shape[2] != channels or not inputs.is_floating_point():
                raise ValueError(
                    f"inputs: got {inputs.dtype} of shape {tuple(inputs.shape)}, allowed is "
                    f"(B, N, {channels}) floats"
                )
        if inputs.shape[1] > longest:
            raise ValueError(
                f"inputs: got {inputs.shape[1]} tokens, allowed is at most {longest}, "
                "max_position_embeddings"
            )
