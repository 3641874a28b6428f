"""The published model's pretraining step in plain PyTorch, with this project's weights.

Its cost structure: the first layer keeps the logits of every query and softmaxes them twice, the
heads are reduced for all of them, masks and visible tokens are found sample by sample in Python,
hidden keys are attended to with a bias, and all positions are decoded before the masked ones are
picked out. The draws are given, so that its loss can be compared with ours.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sma_fast.models import SMAForPretraining
from sma_fast.models.layers import AttentionLayer


class Draws(NamedTuple):
    """What a step drew: (B, R) queries, -1 behind a row's own number, and perhaps their heads."""

    query_index: Tensor
    head_index: Tensor | None


def first_layer(
    model: SMAForPretraining, inputs: Tensor, valid: Tensor, draws: Draws
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns the first layer's output, which of its rows are tokens, and the mask (B, N)."""
    encoder, masking = model.encoder, model.config.masking
    layer, embeddings = encoder.first, encoder.embedding(inputs)
    tokens = encoder.latents is None
    x = embeddings if tokens else encoder.latents.expand(len(inputs), -1, -1)
    logits, value = _logits(layer, layer.query_norm(x), embeddings)
    bias = _bias(valid == 0)
    logits = logits + bias  # (B, H, M, N)
    mask = _mask(masking, logits.detach(), valid, draws)
    x = _attend(layer, x, (logits + _bias(mask)).softmax(3), value)
    if not tokens:
        return x, None, mask
    rows = [x[b][(valid[b] == 1) & ~mask[b]] for b in range(len(x))]
    longest = max(len(row) for row in rows)
    padded = torch.zeros(len(x), longest, x.shape[2])
    attend = torch.zeros(len(x), longest, dtype=torch.bool)
    for b, row in enumerate(rows):
        padded[b, : len(row)] = row
        attend[b, : len(row)] = True
    return padded, attend, mask


def later_layers(model: SMAForPretraining, x: Tensor, attend: Tensor | None) -> Tensor:
    """Returns the encoder's output; this part costs the same in both."""
    for _ in range(model.config.num_blocks):
        for layer in model.encoder.layers:
            x = layer.among(x, attend)
    return x


def decoder_loss(
    model: SMAForPretraining, inputs: Tensor, x: Tensor, attend: Tensor | None, mask: Tensor
) -> Tensor:
    """Returns the loss over the masked positions, having decoded all."""
    decoder, layer = model.decoder, model.decoder.layer
    queries = decoder.queries.weight[: inputs.shape[1]].expand(len(inputs), -1, -1)
    logits, value = _logits(layer, layer.query_norm(queries), decoder.context_norm(x))
    if attend is not None:
        logits = logits + _bias(~attend)
    out = decoder.output(decoder.norm(_attend(layer, queries, logits.softmax(3), value)))
    if model.config.input_type == "discrete":
        return F.cross_entropy(out[mask], inputs[mask])
    return F.mse_loss(out[mask], inputs[mask])


def _logits(layer: AttentionLayer, queries: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    query, key, value = (
        layer.split(y) for y in (layer.query(queries), layer.key(context), layer.value(context))
    )
    return query @ key.transpose(2, 3) / math.sqrt(query.shape[3]), value


def _attend(layer: AttentionLayer, x: Tensor, attention: Tensor, value: Tensor) -> Tensor:
    x = x + layer.output((attention @ value).transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.mlp_norm(x))


def _bias(hidden: Tensor) -> Tensor:  # (B, N) bool -> (B, 1, 1, N)
    lowest = torch.finfo(torch.float32).min / 4
    return torch.zeros(hidden.shape).masked_fill(hidden, lowest)[:, None, None, :]


def _mask(masking, logits: Tensor, valid: Tensor, draws: Draws) -> Tensor:
    attention = logits.softmax(3)
    batch, heads, queries, tokens = attention.shape
    if draws.head_index is None:
        reduced = attention.mean(1)  # (B, M, N)
    else:
        head = torch.zeros((batch, queries), dtype=torch.int64)
        drawn = draws.query_index >= 0
        for b in range(batch):
            head[b, draws.query_index[b][drawn[b]]] = draws.head_index[b][drawn[b]]
        index = head[:, None, :, None].expand(-1, 1, -1, tokens)
        reduced = attention.gather(1, index).squeeze(1)
    mask = torch.zeros(batch, tokens, dtype=torch.bool)
    for b in range(batch):
        chosen = draws.query_index[b][draws.query_index[b] >= 0]
        scores = reduced[b][chosen].sum(0)
        if masking.mask_self:
            scores[chosen] = float("inf")
        scores[valid[b] == 0] = -1.0
        number = round(masking.mask_ratio * int(valid[b].sum()))
        mask[b, scores.topk(number).indices] = True
    return mask
