"""SMA as published, built the cheap way: same loss, without the work that the mask throws away.

Attention is scored for the drawn queries only, values and later layers see visible tokens only, and
only masked positions are decoded. Latents' queries are projected once for the batch; of tokens
that attend to each other only the drawn and the visible ones are projected to queries.

Letters in the shapes: B batch, N tokens, V visible, K masked, H heads, M latents, E embedding,
C latent width.
"""

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sma_fast.masking.sma import SMAMasking, given_selection
from sma_fast.models.hub import HubModel
from sma_fast.models.layers import AttentionLayer, SMAEmbedding
from sma_fast.models.sma_config import SMAConfig
from sma_fast.ops import TokenSelection, gather_tokens

_NO_TARGET = -100  # cross_entropy's ignore_index


class SMAEncoding(NamedTuple):
    """What `SMAEncoder` returns.

    Attributes:
        last_hidden_state: (B, M, C); of a self-attention encoder (B, V, C), the visible tokens in
            the order of `selection.ids_visible`, zeros where a row has fewer.
        attend: (B, V) bool, True where a row is a token; None where all are.
        selection: TokenSelection, or None where nothing was masked.
        scores: (B, N) float32, the attention each token received; None without a guided mask.
    """

    last_hidden_state: Tensor
    attend: Tensor | None
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


class SMAPrediction(NamedTuple):
    """What `SMAForPrediction` returns.

    Attributes:
        loss: scalar, None without labels.
        logits: (B, num_labels).
        last_hidden_state: (B, M or N, C).
    """

    loss: Tensor | None
    logits: Tensor
    last_hidden_state: Tensor


class SMAEncoder(nn.Module):
    """A first layer that masks, and layers over what is left: latents, or the visible tokens.

    Attributes:
        checkpointing: whether the layers after the first compute their activations again in the
            backward pass instead of keeping them.
    """

    def __init__(self, config: SMAConfig) -> None:
        super().__init__()
        width, depth = config.latent_channels, config.num_self_attends_per_block
        self.num_blocks = config.num_blocks
        self.checkpointing = False
        self.embedding = SMAEmbedding(config)
        latents = config.encoder_type == "cross_attention"
        self.latents = nn.Parameter(torch.empty(config.num_latents, width)) if latents else None
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
                config.drop_path_prob * (i + 1) / depth,
            )
            for i in range(depth)
        )

    def latent_queries(self) -> Tensor:
        """Returns (1, M, qk): the latents' queries at the first layer, the same for all samples."""
        latents = self.latents.unsqueeze(0)
        return self.first.query(self.first.query_norm(latents))

    def token_queries(self, embeddings: Tensor) -> Tensor:
        """Returns (B, R, qk): the tokens' own queries at the first layer.

        Args:
            embeddings: (B, R, E), of any tokens.
        """
        return self.first.query(self.first.query_norm(embeddings))

    def forward(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        masking: SMAMasking | None = None,
        mask: Tensor | None = None,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> SMAEncoding:
        """Returns what the last layer gives; masks by `mask`, by `masking` or not at all.

        Args:
            inputs: (B, N) token ids, or (B, N, channels) values.
            attention_mask: (B, N), 1 = valid, 0 = padding.
            masking: how to mask. Default: nothing is masked.
            mask: (B, N) bool, True = masked, takes the place of `masking`.
            progress: the share of training that is done, in [0, 1], for annealed masks.
            generator: for the draws. Default: torch's global one.

        Returns:
            SMAEncoding.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        _check_masks(inputs, attention_mask, mask)
        padding = None if attention_mask is None else attention_mask == 0
        embeddings = self.embedding(inputs)  # (B, N, E)
        draws = {"key_padding_mask": padding, "generator": generator}
        selection = scores = key = visible = None
        query = None if self.latents is None else self.latent_queries()  # (1, M, qk)
        if mask is not None:
            selection = given_selection(mask, padding)
        elif masking is not None and masking.mask == "random":
            selection = masking.random(inputs, **draws)
        elif masking is not None:
            key = self.first.key(embeddings)  # (B, N, qk)
            draws["progress"] = progress
            if self.latents is None:
                selection, scores = self._guided_by_tokens(masking, embeddings, key, draws)
                key = gather_tokens(key, selection.ids_visible)
            else:
                heads = self.first.split(query.detach()), self.first.split(key)
                guided = masking.guided(*heads, key, embeddings, **draws)
                selection, scores, (key, visible) = guided[:3]
        # values are projected for visible tokens only, so embeddings are gathered, not values
        if visible is None:
            visible = embeddings
            if selection is not None:
                visible = gather_tokens(embeddings, selection.ids_visible)  # (B, V, E)
        if key is None:
            key = self.first.key(visible)

        attend = _attend(selection, padding, ragged=padding is not None or mask is not None)
        if self.latents is None:
            x, query = visible, self.token_queries(visible)
        else:
            x = self.latents.unsqueeze(0)
        x = self.first(x, query, key, self.first.value(visible), attend)  # (B, M or V, C)
        if self.latents is not None:
            attend = None  # latents are never padding
        for _ in range(self.num_blocks):
            for layer in self.layers:
                if self.checkpointing and self.training:
                    x = checkpoint(layer.among, x, attend, use_reentrant=False)
                else:
                    x = layer.among(x, attend)
        if attend is not None:
            x = x.masked_fill(~attend.unsqueeze(2), 0.0)
        return SMAEncoding(x, attend, selection, scores)

    @torch.no_grad()
    def _guided_by_tokens(
        self, masking: SMAMasking, embeddings: Tensor, key: Tensor, draws: dict
    ) -> tuple[TokenSelection, Tensor]:
        return masking.guided_by_tokens(
            embeddings,
            self.first.split(key),
            lambda rows: self.first.split(self.token_queries(rows)),
            **draws,
        )


class SMADecoder(nn.Module):
    """One cross-attention layer onto the encoder's output, a normalisation, and an output layer."""

    def __init__(self, config: SMAConfig, outputs: int) -> None:
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
        self.output = nn.Linear(width, outputs)

    def decode(self, x: Tensor, query: Tensor, encoding: SMAEncoding) -> Tensor:
        """Returns (B, K, outputs).

        Args:
            x: (B or 1, K, width), the queries as they are, for the residual.
            query: (B or 1, K, qk), the queries projected.
            encoding: what they attend to.
        """
        context = self.context_norm(encoding.last_hidden_state)
        key, value = self.layer.key(context), self.layer.value(context)
        return self.output(self.norm(self.layer(x, query, key, value, encoding.attend)))


class SMAPositionDecoder(SMADecoder):
    """Predicts what stands at given positions; its queries are one learned row per position."""

    def __init__(self, config: SMAConfig, embedding: SMAEmbedding) -> None:
        discrete = config.input_type == "discrete"
        super().__init__(config, config.num_discrete_tokens if discrete else config.input_channels)
        width = config.decoder_channels
        if config.share_decoder_queries:
            self.queries = embedding.positions
        else:
            self.queries = nn.Embedding(config.max_position_embeddings, width)
        if discrete and config.share_embedding_weights and width == config.embedded_channels:
            self.output.weight = embedding.tokens.weight

    def forward(self, encoding: SMAEncoding, ids: Tensor, length: int) -> Tensor:
        """Returns (B, K, vocabulary or channels), the prediction at each of the positions `ids`.

        Args:
            encoding: the encoder's output.
            ids: (B, K) int64 positions below `length`; what stands at -1 means nothing.
            length: N.
        """
        table = self.queries.weight[:length]  # (N, width)
        ids = ids.clamp(min=0)
        query = self.layer.query(self.layer.query_norm(table))  # once per position, not per sample
        return self.decode(F.embedding(ids, table), F.embedding(ids, query), encoding)


class SMALabelDecoder(SMADecoder):
    """Predicts the labels of a sample, from one learned query."""

    def __init__(self, config: SMAConfig) -> None:
        super().__init__(config, config.num_labels)
        self.query = nn.Parameter(torch.empty(1, config.decoder_channels))

    def forward(self, encoding: SMAEncoding) -> Tensor:
        """Returns (B, num_labels)."""
        x = self.query.unsqueeze(0)  # (1, 1, width)
        return self.decode(x, self.layer.query(self.layer.query_norm(x)), encoding).squeeze(1)


class _SMAModel(nn.Module, HubModel):
    # what the two models share: weights at the start, saving, and what the Trainer asks for

    main_input_name = "inputs"

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None):
        """Computes activations again in the backward pass, from now on: less memory, more time."""
        self.encoder.checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keeps activations, from now on."""
        self.encoder.checkpointing = False

    def _initialise(self) -> None:
        std, position_std = self.config.initializer_range, self.config.pe_initializer_range
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, SMALabelDecoder):
                nn.init.normal_(module.query, std=std)
        if self.encoder.latents is not None:
            nn.init.normal_(self.encoder.latents, std=std)
        nn.init.normal_(self.encoder.embedding.positions.weight, std=position_std)


class SMAForPretraining(_SMAModel):
    """SMA's pretraining model: hides tokens, encodes the rest, reconstructs what was hidden.

    `save_pretrained(folder)` and `from_pretrained(folder or hub name)` are huggingface_hub's.

    Args:
        config: SMAConfig.

    Attributes:
        progress: the share of training that is done, in [0, 1], for annealed masks.
        masking: SMAMasking that takes the place of ``config.masking``, as in validation; None for
            none.

    Source: Self-Guided Masked Autoencoders (arXiv 2402.14789), section 3.
    """

    def __init__(self, config: SMAConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = SMAEncoder(config)
        self.decoder = SMAPositionDecoder(config, self.encoder.embedding)
        self.progress = 1.0
        self.masking: SMAMasking | None = None
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
        masking = self.masking or self.config.masking
        encoding = self.encoder(inputs, attention_mask, masking, mask, self.progress, generator)
        ids = encoding.selection.ids_masked  # (B, K)
        logits = self.decoder(encoding, ids, inputs.shape[1])
        loss = self._loss(logits.float(), gather_tokens(inputs, ids), ids >= 0)
        return SMAOutput(
            loss, encoding.last_hidden_state, encoding.selection.mask, ids, logits, encoding.scores
        )

    def num_targets(self, inputs: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Returns how many tokens of a batch the loss is a mean over, where no mask is given.

        Args:
            inputs: (B, N) token ids, or (B, N, channels) values.
            attention_mask: (B, N), 1 = valid, 0 = padding.

        Returns:
            Scalar int64.
        """
        if attention_mask is None:
            attention_mask = torch.ones(inputs.shape[:2], device=inputs.device)
        return self.config.masking.count_masked(attention_mask.sum(dim=1)).sum()

    def _loss(self, logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        total = counted.sum().clamp(min=1)
        if self.config.input_type == "discrete":
            targets = torch.where(counted, targets.long(), _NO_TARGET)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / total
        error = (logits - targets.float()).square().mean(dim=2)  # (B, K)
        return torch.where(counted, error, 0.0).sum() / total


class SMAForPrediction(_SMAModel):
    """SMA's encoder with nothing masked, and one learned query that predicts labels.

    `save_pretrained(folder)` and `from_pretrained(folder or hub name)` are huggingface_hub's.

    Args:
        config: SMAConfig; `num_labels` and `problem_type` say what is predicted.

    Source: Self-Guided Masked Autoencoders (arXiv 2402.14789), section 4.
    """

    def __init__(self, config: SMAConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = SMAEncoder(config)
        self.decoder = SMALabelDecoder(config)
        self._initialise()

    @classmethod
    def from_pretraining(cls, model: SMAForPretraining, **changes: object) -> "SMAForPrediction":
        """Returns a model with the pretrained encoder and a new decoder.

        Args:
            model: whose encoder is copied.
            changes: fields of its config that differ: `num_labels`, `problem_type`, dropouts, ...

        Returns:
            SMAForPrediction.

        Raises:
            TypeError, ValueError: for unknown fields, or those that change the encoder's shape.
        """
        prediction = cls(dataclasses.replace(model.config, **changes))
        try:
            prediction.encoder.load_state_dict(model.encoder.state_dict())
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"changes: these do not fit the pretrained encoder: {reason[:300]}"
            ) from None
        return prediction

    def forward(
        self, inputs: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> SMAPrediction:
        """Returns the predicted labels, and their loss.

        Args:
            inputs: (B, N) token ids, or (B, N, channels) values.
            attention_mask: (B, N), 1 = valid, 0 = padding.
            labels: (B,) int64 classes; or (B, num_labels) floats, 0 or 1 for multi-label, any for
                regression ((B,) with one label). NaN: not known, left out of the loss.

        Returns:
            SMAPrediction; the loss is cross-entropy, binary cross-entropy or the squared error.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.
        """
        encoding = self.encoder(inputs, attention_mask)
        logits = self.decoder(encoding)
        loss = None if labels is None else self._loss(logits.float(), labels)
        return SMAPrediction(loss, logits, encoding.last_hidden_state)

    def num_targets(
        self, inputs: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Returns how many known labels of a batch the loss is a mean over.

        Args:
            inputs, attention_mask, labels: as in `forward`.

        Returns:
            Scalar int64.
        """
        if self.config.problem_type == "single_label_classification":
            return (labels != _NO_TARGET).sum()
        return (~labels.isnan()).sum()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        kind = self.config.problem_type
        shape = logits.shape
        if kind == "single_label_classification":
            shape = logits.shape[:1]
        elif labels.dim() == 1 and logits.shape[1] == 1:
            labels = labels.unsqueeze(1)
        if labels.shape != shape:
            raise ValueError(
                f"labels: got shape {tuple(labels.shape)}, allowed is {tuple(shape)} for {kind}"
            )
        if kind == "single_label_classification":
            if labels.is_floating_point():
                raise TypeError(f"labels: got {labels.dtype}, allowed is integers for {kind}")
            known = labels[labels != _NO_TARGET] if _may_look_at(labels) else labels[:0]
            if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < logits.shape[1]:
                raise ValueError(
                    f"labels: holds {int(known.min())} to {int(known.max())}, allowed is 0 to "
                    f"{logits.shape[1] - 1}"
                )
            return F.cross_entropy(logits, labels.long())
        known = ~labels.isnan()
        labels = torch.where(known, labels, 0.0).float()
        if kind == "regression":
            each = (logits - labels).square()
        else:
            each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return torch.where(known, each, 0.0).sum() / known.sum().clamp(min=1)


def _attend(
    selection: TokenSelection | None, padding: Tensor | None, ragged: bool
) -> Tensor | None:
    # (B, V) True where a gathered row is a token; None where every row is full
    if not ragged:
        return None
    attend = ~padding if selection is None else selection.ids_visible >= 0
    # a row without any visible token attends to the empty rows instead of dividing by zero
    return attend | ~attend.any(dim=1, keepdim=True)


def _may_look_at(x: Tensor) -> bool:
    # at its values: on a GPU that would wait for it, in a compiled graph break that
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_masks(inputs: Tensor, attention_mask: Tensor | None, mask: Tensor | None) -> None:
    for name, given in (("attention_mask", attention_mask), ("mask", mask)):
        if given is not None and given.shape != inputs.shape[:2]:
            raise ValueError(
                f"{name}: got shape {tuple(given.shape)}, allowed is {tuple(inputs.shape[:2])}, "
                "(B, N) of inputs"
            )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: got {mask.dtype}, allowed is bool, True = masked")
