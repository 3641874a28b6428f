"""Per op, one block: schema, fake, autograd formula.

The registered ops take every argument by position, with defaults already filled in by
`sma_fast.ops`. Fakes give shapes and types only and are shared by torch.compile and opcheck.
Ops that only select carry no gradient.
"""

import torch

from sma_fast import reference

library = torch.library.Library("sma_fast", "DEF")

SCHEMAS = {
    "attention_scores": (
        "(Tensor query, Tensor key, Tensor? query_index, Tensor? head_index,"
        " Tensor? key_padding_mask, float scale, str head_reduce) -> Tensor"
    ),
    "aggregate_attention": (
        "(Tensor attention, Tensor? query_index, Tensor? head_index, str head_reduce,"
        " bool logits) -> Tensor"
    ),
    "select_tokens": (
        "(Tensor scores, Tensor? key_padding_mask, Tensor? noise, float? mask_ratio,"
        " SymInt? num_masked, Tensor? num_masked_rows, SymInt? max_masked, float random_fraction,"
        " float? pool_ratio) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "draw_queries": (
        "(Tensor noise, SymInt num_queries, Tensor? num_queries_rows, Tensor? padding_mask)"
        " -> Tensor"
    ),
    "gather_tokens": "(Tensor tokens, Tensor ids) -> Tensor",
    "gather_tokens_backward": "(Tensor grad, Tensor ids, SymInt num_tokens) -> Tensor",
    "restore_tokens": "(Tensor visible, Tensor ids_restore, Tensor fill) -> Tensor",
    "restore_tokens_backward": (
        "(Tensor grad, Tensor ids_restore, SymInt num_visible, SymInt? num_fill)"
        " -> (Tensor, Tensor)"
    ),
    "self_guided_masking": (
        "(Tensor query, Tensor key, Tensor[] tokens, Tensor query_index, Tensor? head_index,"
        " Tensor? key_padding_mask, Tensor? noise, float mask_ratio, float scale, str head_reduce,"
        " bool mask_queries, float random_fraction, float? pool_ratio)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])"
    ),
    "random_masking": (
        "(Tensor tokens, Tensor noise, float mask_ratio) -> (Tensor, Tensor, Tensor)"
    ),
    "bipartition": (
        "(Tensor embeddings, Tensor? key_padding_mask, str method, int iterations, float tol)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "informed_scores": (
        "(Tensor embeddings, Tensor labels, Tensor? key_padding_mask, str cluster) -> Tensor"
    ),
}

for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema)

_ops = torch.ops.sma_fast


def _fake(function):
    torch.library.register_fake(f"sma_fast::{function.__name__}", function, lib=library)
    return function


def _autograd(name, setup, backward):
    torch.library.register_autograd(f"sma_fast::{name}", backward, setup_context=setup, lib=library)


def _no_gradient(name):
    # nothing to record: autograd steps aside, which costs a call nothing
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")


# attention_scores


@_fake
def attention_scores(query, key, query_index, head_index, key_padding_mask, scale, head_reduce):
    batch, tokens = key.shape[0], key.shape[2]
    shape = (batch, query.shape[1], tokens) if head_reduce == "none" else (batch, tokens)
    return key.new_empty(shape, dtype=torch.float32)


_no_gradient("attention_scores")


# aggregate_attention


@_fake
def aggregate_attention(attention, query_index, head_index, head_reduce, logits):
    batch, heads, _, tokens = attention.shape
    shape = (batch, heads, tokens) if head_reduce == "none" else (batch, tokens)
    return attention.new_empty(shape, dtype=torch.float32)


_no_gradient("aggregate_attention")


# select_tokens


def _fake_selection(like, batch, tokens, width_visible, width_masked):
    return (
        like.new_empty((batch, tokens), dtype=torch.bool),
        like.new_empty((batch, width_visible), dtype=torch.int64),
        like.new_empty((batch, width_masked), dtype=torch.int64),
        like.new_empty((batch, tokens), dtype=torch.int64),
        like.new_empty((batch,), dtype=torch.int32),
        like.new_empty((batch,), dtype=torch.int32),
    )


@_fake
def select_tokens(
    scores,
    key_padding_mask,
    noise,
    mask_ratio,
    num_masked,
    num_masked_rows,
    max_masked,
    random_fraction,
    pool_ratio,
):
    batch, tokens = scores.shape
    widths = reference.selection_widths(
        tokens, mask_ratio, num_masked, num_masked_rows is not None, max_masked
    )
    return _fake_selection(scores, batch, tokens, *widths)


_no_gradient("select_tokens")


# draw_queries


@_fake
def draw_queries(noise, num_queries, num_queries_rows, padding_mask):
    return noise.new_empty((noise.shape[0], num_queries), dtype=torch.int64)


_no_gradient("draw_queries")


# gather_tokens: its backward is linear too, so the two are each other's derivative


@_fake
def gather_tokens(tokens, ids):
    return tokens.new_empty(ids.shape + tokens.shape[2:])


@_fake
def gather_tokens_backward(grad, ids, num_tokens):
    return grad.new_empty((grad.shape[0], num_tokens) + grad.shape[2:])


def _gather_setup(ctx, inputs, output):
    tokens, ids = inputs
    ctx.save_for_backward(ids)
    ctx.num_tokens = tokens.shape[1]


def _gather_backward(ctx, grad):
    (ids,) = ctx.saved_tensors
    return _ops.gather_tokens_backward(grad, ids, ctx.num_tokens), None


def _gather_backward_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _gather_backward_backward(ctx, grad):
    (ids,) = ctx.saved_tensors
    return _ops.gather_tokens(grad, ids), None, None


_autograd("gather_tokens", _gather_setup, _gather_backward)
_autograd("gather_tokens_backward", _gather_backward_setup, _gather_backward_backward)


# restore_tokens: linear in (visible, fill), as its backward is in the gradient


@_fake
def restore_tokens(visible, ids_restore, fill):
    return visible.new_empty(ids_restore.shape + visible.shape[2:])


@_fake
def restore_tokens_backward(grad, ids_restore, num_visible, num_fill):
    batch, _, width = grad.shape
    fill = (width,) if num_fill is None else (batch, num_fill, width)
    return grad.new_empty((batch, num_visible, width)), grad.new_empty(fill)


def _restore_setup(ctx, inputs, output):
    visible, ids_restore, fill = inputs
    ctx.save_for_backward(ids_restore)
    ctx.num_visible = visible.shape[1]
    ctx.num_fill = fill.shape[1] if fill.dim() == 3 else None


def _restore_backward(ctx, grad):
    (ids_restore,) = ctx.saved_tensors
    to_visible, to_fill = _ops.restore_tokens_backward(
        grad, ids_restore, ctx.num_visible, ctx.num_fill
    )
    return to_visible, None, to_fill


def _restore_backward_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _restore_backward_backward(ctx, grad_visible, grad_fill):
    (ids_restore,) = ctx.saved_tensors
    return _ops.restore_tokens(grad_visible, ids_restore, grad_fill), None, None, None


_autograd("restore_tokens", _restore_setup, _restore_backward)
_autograd("restore_tokens_backward", _restore_backward_setup, _restore_backward_backward)


# self_guided_masking: only the gathered tokens carry a gradient


@_fake
def self_guided_masking(
    query,
    key,
    tokens,
    query_index,
    head_index,
    key_padding_mask,
    noise,
    mask_ratio,
    scale,
    head_reduce,
    mask_queries,
    random_fraction,
    pool_ratio,
):
    batch, count = key.shape[0], key.shape[2]
    width_visible, width_masked = reference.selection_widths(count, mask_ratio, None, False, None)
    visible = [x.new_empty((batch, width_visible) + x.shape[2:]) for x in tokens]
    scores = key.new_empty((batch, count), dtype=torch.float32)
    selection = _fake_selection(key, batch, count, width_visible, width_masked)
    return (scores, *selection, visible)


def _self_guided_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[:7])
    ctx.save_for_backward(output[2])
    ctx.num_tokens = inputs[1].shape[2]


def _self_guided_backward(ctx, *grads):
    (ids_visible,) = ctx.saved_tensors
    to_tokens = [
        _ops.gather_tokens_backward(g, ids_visible, ctx.num_tokens) if needed else None
        for g, needed in zip(grads[7], ctx.needs_input_grad[2], strict=True)
    ]
    return (None, None, to_tokens) + (None,) * 10


_autograd("self_guided_masking", _self_guided_setup, _self_guided_backward)


# random_masking: ids_restore alone says where each visible row came from


@_fake
def random_masking(tokens, noise, mask_ratio):
    batch, count = tokens.shape[:2]
    keep = torch.sym_int(count * (1 - mask_ratio))  # int() would pin the size
    return (
        tokens.new_empty((batch, keep) + tokens.shape[2:]),
        tokens.new_empty((batch, count), dtype=torch.float32),
        tokens.new_empty((batch, count), dtype=torch.int64),
    )


def _random_setup(ctx, inputs, output):
    _, mask, ids_restore = output
    ctx.mark_non_differentiable(mask, ids_restore)
    ctx.save_for_backward(ids_restore)


def _random_backward(ctx, grad, grad_mask, grad_ids):
    (ids_restore,) = ctx.saved_tensors
    rows = grad.flatten(2) if grad.dim() > 2 else grad.unsqueeze(2)  # (B, V, C)
    back = _ops.restore_tokens(rows, ids_restore, rows.new_zeros(rows.shape[2]))
    return back.reshape(ids_restore.shape + grad.shape[2:]), None, None


_autograd("random_masking", _random_setup, _random_backward)


# bipartition


@_fake
def bipartition(embeddings, key_padding_mask, method, iterations, tol):
    batch, tokens = embeddings.shape[:2]
    return (
        embeddings.new_empty((batch, tokens), dtype=torch.float32),
        embeddings.new_empty((batch, tokens), dtype=torch.bool),
        embeddings.new_empty((batch, tokens), dtype=torch.int64),
        embeddings.new_empty((batch,), dtype=torch.float32),
        embeddings.new_empty((batch,), dtype=torch.bool),
    )


_no_gradient("bipartition")


# informed_scores


@_fake
def informed_scores(embeddings, labels, key_padding_mask, cluster):
    return embeddings.new_empty(embeddings.shape[:2], dtype=torch.float32)


_no_gradient("informed_scores")
