"""What a masked autoencoder of pictures is made of: blocks, encoder, decoder, patches.

Patches are gathered before they are projected, so that a masked patch costs nothing and the gather
needs no gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sma_fast import ops
from sma_fast.models import vit_selection
from sma_fast.models.vit_config import MAEConfig


class Block(nn.Module):
    """Self-attention, then an MLP, both pre-norm with a residual, as in timm's ViT.

    Args:
        width: C.
        heads: H, which divides C.
        mlp_width: of the MLP.
        qkv_bias: whether queries, keys and values have a bias.
        eps: of the normalisations.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, qkv_bias: bool, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.output = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width)
        )

    def split(self, x: Tensor) -> Tensor:
        """(B, N, H D) -> (B, H, N, D), a view."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, attend: Tensor | None = None) -> Tensor:
        """Returns (B, N, C).

        Args:
            x: (B, N, C).
            attend: (B, N) bool, True = may be attended to. Default: all.
        """
        query, key, value = (self.split(y) for y in self.qkv(self.norm1(x)).chunk(3, dim=2))
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=None if attend is None else attend[:, None, None, :]
        )  # (B, H, N, D)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

    def first_query_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the query of the first token and all keys: (B, H, 1, D) and (B, H, N, D).

        Args:
            x: (B, N, C).
        """
        normed, width = self.norm1(x), x.shape[2]
        weight, bias = self.qkv.weight, self.qkv.bias

        def project(x: Tensor, part: int) -> Tensor:
            rows = slice(part * width, (part + 1) * width)
            return self.split(F.linear(x, weight[rows], None if bias is None else bias[rows]))

        return project(normed[:, :1], 0), project(normed, 1)


class _Blocks(nn.Module):
    # positions, blocks and the last normalisation: what encoder and decoder share

    def __init__(self, config: MAEConfig, width: int, depth: int, heads: int, mlp: int) -> None:
        super().__init__()
        grid = config.image_size // config.patch_size
        # saved with the weights, since checkpoints of others may hold other positions
        self.register_buffer("positions", sincos_positions(grid, width))  # (1 + N, width)
        self.layers = nn.ModuleList(
            Block(width, heads, mlp, config.qkv_bias, config.layer_norm_eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.checkpointing = False

    def through(self, x: Tensor, attend: Tensor | None = None, depth: int | None = None) -> Tensor:
        # x (B, 1 + V, width) -> the same shape, after the first `depth` blocks
        for layer in self.layers[:depth]:
            if self.checkpointing and self.training:
                x = checkpoint(layer, x, attend, use_reentrant=False)
            else:
                x = layer(x, attend)
        return x


class MAEEncoder(_Blocks):
    """ViT over a class token and the visible patches.

    Attributes:
        checkpointing: whether blocks compute their activations again in the backward pass.
    """

    def __init__(self, config: MAEConfig) -> None:
        super().__init__(
            config,
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.intermediate_size,
        )
        self.patches = nn.Linear(config.patch_channels, config.hidden_size)
        self.class_token = nn.Parameter(torch.empty(config.hidden_size))

    def embed(self, patches: Tensor, ids: Tensor | None = None) -> Tensor:
        """Returns class token and patches with their positions, (B, 1 + V, C).

        Args:
            patches: (B, N, patch channels).
            ids: (B, V) int64, the patches to take; those at -1 mean nothing. Default: all.
        """
        positions = self.positions[1:]  # (N, C)
        if ids is not None:
            patches = ops.gather_tokens(patches, ids)
            positions = F.embedding(ids.clamp(min=0), positions)  # (B, V, C)
        x = self.patches(patches) + positions
        first = (self.class_token + self.positions[0]).to(x.dtype)
        return torch.cat([first.expand(x.shape[0], 1, -1), x], dim=1)

    def forward(self, patches: Tensor, selection: ops.TokenSelection | None = None) -> Tensor:
        """Returns (B, 1 + V, C), normalised: the class token, then the visible patches.

        Args:
            patches: (B, N, patch channels).
            selection: which are visible. Default: all.
        """
        ids = None if selection is None else selection.ids_visible
        attend = None if selection is None else vit_selection.attend(selection)
        return self.norm(self.through(self.embed(patches, ids), attend))


class MAEDecoder(_Blocks):
    """A narrower transformer over all patches, mask tokens in place of the masked ones."""

    def __init__(self, config: MAEConfig) -> None:
        width = config.decoder_hidden_size
        super().__init__(
            config,
            width,
            config.decoder_num_hidden_layers,
            config.decoder_num_attention_heads,
            config.decoder_intermediate_size,
        )
        self.embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.output = nn.Linear(width, config.patch_channels)

    def forward(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        """Returns (B, N, patch channels).

        Args:
            x: (B, 1 + V, C), the encoder's output.
            ids_restore: (B, N) int64, as in TokenSelection.
        """
        # the class token stands first on both sides, so one restore leaves it there
        ids = F.pad(ids_restore + 1, (1, 0))  # (B, 1 + N)
        x = self.embed(x)
        x = ops.restore_tokens(x, ids, self.mask_token.to(x.dtype)) + self.positions
        return self.output(self.norm(self.through(x)[:, 1:]))


def sincos_positions(grid: int, width: int) -> Tensor:
    """Returns MAE's fixed positions of a class token and grid x grid patches, (1 + grid^2, width).

    The class token's are 0. Half of a patch's channels hold the column, half the row, each half the
    sines and then the cosines of the place at width / 4 frequencies from 1 to nearly 1e-4.

    Args:
        grid: patches in a row, and in a column.
        width: a multiple of 4.

    Source: Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377), appendix A; the
    frequencies are those of Attention Is All You Need (arXiv 1706.03762), section 3.5.
    """
    place = torch.arange(grid, dtype=torch.float64)
    quarter = torch.arange(width // 4, dtype=torch.float64)
    angle = place[:, None] * 10000.0 ** (-quarter / (width // 4))  # (grid, width / 4)
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, width / 2)
    column = wave[None, :].expand(grid, -1, -1)
    row = wave[:, None].expand(-1, grid, -1)
    patches = torch.cat([column, row], dim=2).flatten(0, 1)  # (grid^2, width)
    return F.pad(patches, (0, 0, 1, 0)).float()


def patchify(pixels: Tensor, size: int) -> Tensor:
    """Returns the patches of pictures, row by row: (B, N, size size channels), channels last.

    Args:
        pixels: (B, channels, height, width), height and width multiples of `size`.
        size: height and width of a patch.
    """
    batch, channels, height, width = pixels.shape
    rows, columns = height // size, width // size
    cut = pixels.reshape(batch, channels, rows, size, columns, size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, size * size * channels)


def unpatchify(patches: Tensor, size: int) -> Tensor:
    """Returns square pictures of patches, (B, channels, height, width): what `patchify` undoes.

    Args:
        patches: (B, N, size size channels), N a square number.
        size: height and width of a patch.
    """
    batch, count, values = patches.shape
    grid = round(count**0.5)
    channels = values // (size * size)
    cut = patches.reshape(batch, grid, grid, size, size, channels)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, grid * size, grid * size)
