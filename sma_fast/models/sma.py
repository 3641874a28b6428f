"""SMA as published, built the cheap way: same loss, without the work that the mask throws away.

The latents' queries are projected once for the batch, attention is scored for the drawn queries
only, only visible tokens are attended to, and only masked positions are decoded.

Letters in the shapes: B batch, N tokens, V visible, K masked, H heads, M latents, E embedding,
C latent width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sma_fast.masking.sma import SMAMasking, given_selection
from sma_fast.models.sma_config import SMAConfig
from sma_fast.ops import TokenSelection, gather_tokens

_NO_TARGET = -100  # cross_entropy's ignore_index


class SMAEncoding(NamedTuple):
    """What `SMAEncoder` returns.

    Attributes:
        last_hidden_state: (B, M, C).
        selection: TokenSelection, or None where nothing was masked.
        scores: (B, N) float32, the attention each token received; None without a guided mask.
    """

    last_hidden_state: Tensor
    selection: TokenSelection | None
    scores: Tensor | None


class SMAOutput(NamedTuple):
    """What `SMAForPretraining` returns.

    Attributes:
        loss: scalar, the mean over all masked tokens of the batch; 0 where none is masked.
        last_hidden_state: (B, M, C).
        mask: (B, N) bool, True = masked.
        ids_masked: (B, K) int64, -1 behind the row's own number.
        logits: (B, K, vocabulary or channels), the prediction for each of `ids_masked`.
        scores: (B, N) float32, the attention each token received; None without a guided mask.
    """

    loss: Tensor
    last_hidden_state: Tensor
    mask: Tensor
    ids_masked: Tensor
    logits: Tensor
    scores: Tensor | None


class AttentionLayer(nn.Module):
    """Attention onto any keys and values, then an MLP, both pre-norm with a residual."""

    def __init__(
        self,
        config: SMAConfig,
        width: int,
        kv_width: int,
        qk_channels: int,
        v_channels: int,
        heads: int,
        widening_factor: int,
    ) -> None:
        super().__init__()
        bias = config.dense_use_bias
        self.heads = heads
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
        x = x + self.dropout(self.output(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


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


class SMAEncoder(nn.Module):
    """Latents that attend to the visible tokens once, and to each other from then on."""

    def __init__(self, config: SMAConfig) -> None:
        super().__init__()
        width = config.latent_channels
        self.num_blocks = config.num_blocks
        self.embedding = SMAEmbedding(config)
        self.latents = nn.Parameter(torch.empty(config.num_latents, width))
        self.first = AttentionLayer(
            config,
            width,
            config.embedded_channels,
            config.encoder_cross_attention_channels,
            config.v_channels,
            config.num_cross_attention_heads,
            config.cross_attention_widening_factor,
        )
        self.layers = nn.ModuleList(
            AttentionLayer(
                config,
                width,
                width,
                config.qk_channels,
                config.v_channels,
                config.num_self_attention_heads,
                config.self_attention_widening_factor,
            )
            for _ in range(config.num_self_attends_per_block)
        )

    def latent_queries(self) -> Tensor:
        """Returns (1, M, qk): the latents' queries at the first layer, the same for all samples."""
        latents = self.latents.unsqueeze(0)
        return self.first.query(self.first.query_norm(latents))

    def forward(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        masking: SMAMasking | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> SMAEncoding:
        """Returns the latents after the last layer; masks by `mask`, by `masking` or not at all.

        Args:
            inputs: (B, N) token ids, or (B, N, channels) values.
            attention_mask: (B, N), 1 = valid, 0 = padding.
            masking: how to mask. Default: nothing is masked.
            mask: (B, N) bool, True = masked, takes the place of `masking`.
            generator: for the draws. Default: torch's global one.

        Returns:
            SMAEncoding.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        _check_masks(inputs, attention_mask, mask)
        padding = None if attention_mask is None else attention_mask == 0
        embeddings = self.embedding(inputs)  # (B, N, E)
        latents = self.latents.unsqueeze(0)  # (1, M, C)
        first = self.first
        query = self.latent_queries()  # (1, M, qk)

        selection = scores = None
        if mask is not None:
            selection = given_selection(mask, padding)
        elif masking is not None and masking.mask == "random":
            selection = masking.random(inputs, key_padding_mask=padding, generator=generator)
        if selection is not None:
            visible = gather_tokens(embeddings, selection.ids_visible)  # (B, V, E)
            key = first.key(visible)
        elif masking is not None:
            key = first.key(embeddings)
            guided = masking.guided(
                first.split(query),
                first.split(key),
                key,
                embeddings,
                key_padding_mask=padding,
                generator=generator,
            )
            selection, scores, (key, visible) = guided[:3]
        else:
            visible, key = embeddings, first.key(embeddings)

        # values are projected for visible tokens only, so embeddings are gathered, not values
        attend = _attend(selection, padding, ragged=padding is not None or mask is not None)
        x = first(latents, query, key, first.value(visible), attend)  # (B, M, C)
        for _ in range(self.num_blocks):
            for layer in self.layers:
                normed = layer.query_norm(x)
                x = layer(x, layer.query(normed), layer.key(normed), layer.value(normed))
        return SMAEncoding(x, selection, scores)


class SMADecoder(nn.Module):
    """One cross-attention layer from positions onto the latents: predicts tokens at positions."""

    def __init__(self, config: SMAConfig, embedding: SMAEmbedding) -> None:
        super().__init__()
        width = config.decoder_channels
        self.context_norm = nn.LayerNorm(config.latent_channels)
        self.layer = AttentionLayer(
            config,
            width,
            config.latent_channels,
            config.decoder_qk_channels,
            width,
            config.decoder_heads,
            config.decoder_widening_factor,
        )
        self.norm = nn.LayerNorm(width, eps=1e-12)
        if config.share_decoder_queries:
            self.queries = embedding.positions
        else:
            self.queries = nn.Embedding(config.max_position_embeddings, width)
        discrete = config.input_type == "discrete"
        self.output = nn.Linear(
            width, config.num_discrete_tokens if discrete else config.input_channels
        )
        if discrete and config.share_embedding_weights and width == config.embedded_channels:
            self.output.weight = embedding.tokens.weight

    def forward(self, latents: Tensor, ids: Tensor, length: int) -> Tensor:
        """Returns (B, K, vocabulary or channels), the prediction at each of the positions `ids`.

        Args:
            latents: (B, M, C), the encoder's output.
            ids: (B, K) int64 positions below `length`; what stands at -1 means nothing.
            length: N.
        """
        layer = self.layer
        table = self.queries.weight[:length]  # (N, width)
        ids = ids.clamp(min=0)
        query = layer.query(layer.query_norm(table))  # projected once per position, not per sample
        context = self.context_norm(latents)
        x = layer(
            F.embedding(ids, table),
            F.embedding(ids, query),
            layer.key(context),
            layer.value(context),
        )
        return self.output(self.norm(x))


class SMAForPretraining(nn.Module):
    """SMA's pretraining model: hides tokens, encodes the rest, reconstructs what was hidden.

    Args:
        config: SMAConfig.

    Source: Self-Guided Masked Autoencoders (arXiv 2402.14789), section 3.
    """

    def __init__(self, config: SMAConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = SMAEncoder(config)
        self.decoder = SMADecoder(config, self.encoder.embedding)
        self._initialise()

    def forward(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> SMAOutput:
        """Returns the reconstruction loss over masked tokens, in training and evaluation alike.

        The loss is cross-entropy (discrete) or the squared error averaged over channels
        (continuous), averaged over all masked tokens of the batch.

        Args:
            inputs: (B, N) token ids, or (B, N, channels) values.
            attention_mask: (B, N), 1 = valid, 0 = padding.
            mask: (B, N) bool, True = masked. Default: drawn by ``config.masking``.
            generator: for the draws. Default: torch's global one.

        Returns:
            SMAOutput.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        encoding = self.encoder(inputs, attention_mask, self.config.masking, mask, generator)
        ids = encoding.selection.ids_masked  # (B, K)
        logits = self.decoder(encoding.last_hidden_state, ids, inputs.shape[1])
        loss = self._loss(logits.float(), gather_tokens(inputs, ids), ids >= 0)
        return SMAOutput(
            loss, encoding.last_hidden_state, encoding.selection.mask, ids, logits, encoding.scores
        )

    def _loss(self, logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        total = counted.sum().clamp(min=1)
        if self.config.input_type == "discrete":
            targets = torch.where(counted, targets.long(), _NO_TARGET)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / total
        error = (logits - targets.float()).square().mean(dim=2)  # (B, K)
        return torch.where(counted, error, 0.0).sum() / total

    def _initialise(self) -> None:
        std, position_std = self.config.initializer_range, self.config.pe_initializer_range
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.encoder.latents, std=std)
        nn.init.normal_(self.encoder.embedding.positions.weight, std=position_std)


def _attend(
    selection: TokenSelection | None, padding: Tensor | None, ragged: bool
) -> Tensor | None:
    # (B, V) True where a gathered row is a token; None where every row is full
    if not ragged:
        return None
    attend = ~padding if selection is None else selection.ids_visible >= 0
    # a row without any visible token attends to the empty rows instead of dividing by zero
    return attend | ~attend.any(dim=1, keepdim=True)


def _check_masks(inputs: Tensor, attention_mask: Tensor | None, mask: Tensor | None) -> None:
    for name, given in (("attention_mask", attention_mask), ("mask", mask)):
        if given is not None and given.shape != inputs.shape[:2]:
            raise ValueError(
                f"{name}: got shape {tuple(given.shape)}, allowed is {tuple(inputs.shape[:2])}, "
                "(B, N) of inputs"
            )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: got {mask.dtype}, allowed is bool, True = masked")
