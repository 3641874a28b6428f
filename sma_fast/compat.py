"""Drop-ins with other projects' signatures: thin layers over `sma_fast.ops`.

First the SMA authors' masking class, then the random masks of MAE, transformers' ViTMAE, timm and
lightly, then `patch`, which swaps those into a loaded model. A random mask draws its noise by the
same torch call as the function it replaces: the same seed on the same device masks the same tokens.
Only the order of those kept differs: raster order here, which attention does not see and
`ids_restore` undoes. Wrong arguments raise TypeError or ValueError that name the argument. Shapes:
B batch, N tokens, V visible, H heads, M queries, R selected queries, C token width.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sma_fast import _check, ops

# Self-guided masking, as the SMA authors' class


class RandomlySelectedCrossAttentionMasking:
    """Masks the tokens that a few randomly drawn queries attend to most.

    Called as the SMA authors' class, it masks the same tokens given the same draws, without a loop
    over samples or a wait for the device. It differs where theirs fails: at least one query is
    drawn, and a number above M raises ValueError where theirs silently takes all M; one token of a
    row stays visible; padding may stand anywhere and is never masked; `mask_self` masks the drawn
    tokens whatever the scores, for fixed lengths too. Numbers are rounded in float64 (half to
    even), theirs in float32 where rows are ragged: r = .15 of 190 tokens masks 28 here and 29
    there. M = N means self-attention, as there.

    Args:
        masking_ratio: share r of a row's n valid tokens to mask, in [0, 1].
        num_per_query: tokens masked for each query drawn, k > 0: round(r N / k) queries, in
            self-attention round(r n / k).
        exclude_seen_reconstruction: False: the loss covers all valid tokens, not the masked only.
        varying_length: rows are ragged, which decides how annealing draws.
        select_initial_ratio: s in [0, 1] for annealing, or None. With noise scale a, ragged rows
            mask the top round(r (1 - s a) n) and round(r s a n) of the others at random; fixed
            lengths round(r N) of the top round((r + (s - r) a) N).
        mask_self: self-attention only: mask the drawn tokens before all others.
        head_aggregation: "mean", or "random_mix", one random head for each query.
        relative_noise, kwargs: not used, as there.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Self-Guided Masked Autoencoders (arXiv 2402.14789), section 3.
    """

    def __init__(
        self,
        masking_ratio: float = 0.5,
        num_per_query: float = 576,
        exclude_seen_reconstruction: bool = True,
        varying_length: bool = True,
        relative_noise: float = 0.0,
        select_initial_ratio: float | None = None,
        mask_self: bool = False,
        head_aggregation: str = "mean",
        **kwargs: Any,
    ) -> None:
        _check.ratio("masking_ratio", masking_ratio)
        _check.number("num_per_query", num_per_query)
        if not num_per_query > 0:
            raise ValueError(f"num_per_query: got {num_per_query!r}, allowed is a number above 0")
        _check.ratio("select_initial_ratio", select_initial_ratio or 0.0)
        _check.flag("mask_self", mask_self)
        _check.choice("head_aggregation", head_aggregation, ("mean", "random_mix"))
        self.masking_ratio = masking_ratio
        self.num_per_query = num_per_query
        self.exclude_seen_reconstruction = exclude_seen_reconstruction
        self.varying_length = varying_length
        self.noise_schedule_scale = 0.0
        self.select_initial_ratio = select_initial_ratio
        self.mask_self = mask_self
        self.head_aggregation = head_aggregation

    def set_noise_scale(self, noise_scale: float) -> None:
        """Sets the annealing's a, 0 to mask by attention only; outside [0, 1] a ValueError."""
        _check.ratio("noise_scale", noise_scale)
        self.noise_schedule_scale = noise_scale

    def __call__(
        self,
        attentions: Tensor,
        inputs: Any,
        attention_mask: Tensor,
        loss_mask: Tensor | None = None,
        *,
        query_index: Tensor | None = None,
        head_index: Tensor | None = None,
        noise: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Returns a dict of the arguments, `attentions` softmaxed and both masks edited in place.

        Args:
            attentions: (B, H, M, N) logits with the padding bias in them.
            inputs, kwargs: anything, passed through.
            attention_mask: (B, N), 1 = valid. Masked tokens are set to 0.
            loss_mask: (B, N) or None. Tokens to reconstruct are set to 1.
            query_index: (B, R) queries instead of random ones, -1 behind a row's own number.
            head_index: (B, M) heads instead of random ones, for "random_mix".
            noise: (B, N) float32 in [0, 1): annealing draws the lowest.

        Returns:
            dict of `attentions` (B, H, M, N) after the softmax, `inputs`, `attention_mask`,
            `loss_mask` and what else was given, the masks being the tensors given.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed; too
                many queries as `num_per_query`.
        """
        _check.attention_map("attentions", attentions)
        batch, heads, queries, tokens = attentions.shape
        optional = {} if loss_mask is None else {"loss_mask": loss_mask}
        for name, mask in ({"attention_mask": attention_mask} | optional).items():
            _check.tensor(name, mask, 2, "(B, N)")
            _check.device(name, mask, attentions)
            if mask.shape[0] != batch or mask.shape[1] != tokens:
                given = f"shape {tuple(mask.shape)}"
                raise ValueError(f"{name}: got {given}, allowed is ({batch}, {tokens})")
        if self.mask_self and queries != tokens:
            given = f"True with {queries} queries and {tokens} tokens"
            raise ValueError(f"mask_self: got {given}, allowed is self-attention, M = N")
        padding = attention_mask != 1
        if query_index is None:
            query_index = self._draw_queries(attentions, padding)
        query_index = _check.query_index(query_index, batch, queries, attentions)
        if self.head_aggregation == "mean":
            head_index = None
        elif head_index is None:
            head_index = torch.randint(heads, query_index.shape, device=attentions.device)
        else:
            head_index = _check.head_index(head_index, "mean", batch, queries, None, attentions)
            head_index = head_index.gather(1, query_index.clamp(0, queries - 1))
        scores = ops.aggregate_attention(
            attentions, query_index=query_index, head_index=head_index, logits=True
        )  # (B, N)
        if self.mask_self:
            drawn = torch.zeros(batch, tokens + 1, dtype=torch.bool, device=scores.device)
            drawn.scatter_(1, query_index.clamp(max=tokens) % (tokens + 1), True)  # -1: the last
            scores = scores.masked_fill(drawn[:, :tokens], float("inf"))
        masked = self._select(scores, padding, noise)
        if loss_mask is not None:
            covered = masked if self.exclude_seen_reconstruction else attention_mask != 0
            loss_mask.masked_fill_(covered, 1)
        attention_mask.masked_fill_(masked, 0)
        outputs = {"attentions": attentions.softmax(dim=-1), "inputs": inputs}
        return outputs | {"attention_mask": attention_mask, "loss_mask": loss_mask} | kwargs

    def _draw_queries(self, attentions: Tensor, padding: Tensor) -> Tensor:
        # (B, R); the width needs no look at the data, since no row has more valid tokens than N
        batch, _, queries, tokens = attentions.shape
        width = max(round(tokens * self.masking_ratio / self.num_per_query), min(1, queries))
        if width > queries:
            given = f"got {self.num_per_query}, which draws {width} of {queries} queries"
            raise ValueError(f"num_per_query: {given}, allowed is more tokens per query")
        if queries != tokens:
            device = attentions.device
            return ops.draw_queries(width, batch=batch, num_candidates=queries, device=device)
        n_valid = (~padding).sum(dim=1).double()  # (B,)
        number = (n_valid * self.masking_ratio / self.num_per_query).round().long()
        return ops.draw_queries(number, padding_mask=padding)[:, :width]

    def _select(self, scores: Tensor, padding: Tensor, noise: Tensor | None) -> Tensor:  # (B, N)
        ratio, initial = self.masking_ratio, self.select_initial_ratio
        n_valid = (~padding).sum(dim=1)  # (B,)
        most = (n_valid - 1).clamp(min=0)  # a row that sees nothing would attend to what it masks

        def count(share: float) -> Tensor:
            return torch.minimum((share * n_valid.double()).round().long(), most)

        if initial is None or not self.noise_schedule_scale > 0:
            return _top(scores, count(ratio), padding)
        if not self.varying_length:
            pool_ratio = ratio + (initial - ratio) * self.noise_schedule_scale
            number = count(min(ratio, pool_ratio))
            return _top(scores, number, padding, pool_ratio=pool_ratio, noise=noise)
        if noise is None:
            noise = torch.rand(scores.shape, dtype=torch.float32, device=scores.device)
        _check.noise(noise, *scores.shape, scores)
        # not random_fraction: that rounds the sum of the two numbers, theirs each of them
        random_share = initial * self.noise_schedule_scale
        num_top = count(ratio * (1 - random_share))
        num_random = torch.minimum(count(ratio * random_share), most - num_top)
        top = _top(scores, num_top, padding)
        return top | _top(-noise, num_random, padding | top)


def _top(scores: Tensor, num_masked: Tensor, padding: Tensor, **pool: Any) -> Tensor:
    return ops.select_tokens(scores, num_masked=num_masked, key_padding_mask=padding, **pool).mask


# Random masking, as MAE, transformers, timm and lightly call it


def mae_random_masking(x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (x_masked, mask, ids_restore), as `random_masking` of facebookresearch/mae.

    Equivalent PyTorch::

        keep = int(x.shape[1] * (1 - mask_ratio))
        ids_visible = torch.rand(x.shape[:2]).argsort(1)[:, :keep].sort(1).values  # (B, V)
        x_masked = x.take_along_dim(ids_visible[:, :, None], 1)
        mask = torch.ones(x.shape[:2]).scatter(1, ids_visible, 0.0)

    Args:
        x: (B, N, C), any dtype; differentiable.
        mask_ratio: share of the tokens to mask, in [0, 1].

    Returns:
        x_masked (B, int(N (1 - mask_ratio)), C) in raster order; mask (B, N) float32, 1 = masked;
        ids_restore (B, N) int64.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377), section 3.
    """
    _check.tensor("x", x, -2, "(B, N, C)")
    return ops.random_masking(x, mask_ratio)


def hf_random_masking(
    sequence: Tensor, noise: Tensor | None = None, *, mask_ratio: float = 0.75
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what `mae_random_masking` does, as transformers' `ViTMAEEmbeddings.random_masking`.

    Equivalent PyTorch, beside that of `mae_random_masking`::

        keep = int(sequence.shape[1] * (1 - mask_ratio))
        ids_visible = noise.argsort(1)[:, :keep].sort(1).values  # (B, V)
        sequence_masked = sequence.take_along_dim(ids_visible[:, :, None], 1)

    Args:
        sequence: (B, N, C), any dtype; differentiable.
        noise: (B, N) floats, on any device; the lowest are kept. Default: drawn.
        mask_ratio: share of the tokens to mask, in [0, 1]. After `patch` it is the config's.

    Returns:
        sequence_masked (B, int(N (1 - mask_ratio)), C) in raster order; mask (B, N) float32,
        1 = masked; ids_restore (B, N) int64.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377), section 3.
    """
    _check.tensor("sequence", sequence, -2, "(B, N, C)")
    if noise is not None:
        _check.tensor("noise", noise, 2, "(B, N)", _check.FLOATS)
        if noise.dtype != torch.float32:
            # ranks: float32 of float64 noise could have ties, and so another mask than theirs
            noise = noise.argsort(dim=1).argsort(dim=1).float() / max(noise.shape[1], 1)
        noise = noise.to(sequence.device)
    return ops.random_masking(sequence, mask_ratio, noise=noise)


def timm_patch_dropout_forward(
    x: Tensor, prob: float, num_prefix_tokens: int, ordered: bool, training: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns (tokens kept, keep_indices), as `timm.layers.patch_dropout_forward`.

    Equivalent PyTorch, in training, for (B, P + N, C) `x`::

        prefix, patches = x[:, :num_prefix_tokens], x[:, num_prefix_tokens:]
        num_keep = max(1, int(patches.shape[1] * (1 - prob)))
        keep_indices = torch.randn(patches.shape[:2]).argsort(1)[:, :num_keep].sort(1).values
        kept = torch.cat([prefix, patches.take_along_dim(keep_indices[:, :, None], 1)], 1)

    Args:
        x: (B, P + N, ...), any dtype; differentiable.
        prob: share of the N patch tokens to drop, in [0, 1].
        num_prefix_tokens: P leading tokens that always stay.
        ordered: taken and not used: the tokens kept are in raster order either way.
        training: False: nothing is dropped.

    Returns:
        (B, P + V, ...) with V = max(1, int(N (1 - prob))), and (B, V) int64 ascending, counted
        behind the prefix; or `x` itself and None where nothing is dropped.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: PatchDropout (arXiv 2208.07220).
    """
    _check.tensor("x", x, -2, "(B, P + N, ...)")
    _check.ratio("prob", prob)
    _check.count("num_prefix_tokens", num_prefix_tokens, None)
    if not training or prob == 0:
        return x, None
    batch, prefix = x.shape[0], min(num_prefix_tokens, x.shape[1])
    tokens = x.shape[1] - prefix
    num_keep = min(max(1, int(tokens * (1.0 - prob))), tokens)
    noise = torch.randn(batch, tokens, device=x.device)
    keep_indices = ops.select_tokens(noise, num_masked=tokens - num_keep).ids_visible
    # one gather of prefix and patches, instead of a gather and a copy of its result
    prefix_ids = torch.arange(prefix, device=x.device).expand(batch, -1)
    return ops.gather_tokens(x, torch.cat([prefix_ids, keep_indices + prefix], 1)), keep_indices


def lightly_random_token_mask(
    size: tuple[int, int],
    mask_ratio: float = 0.6,
    mask_class_token: bool = False,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (idx_keep, idx_mask), as `lightly.models.utils.random_token_mask`.

    Equivalent PyTorch::

        first = 0 if mask_class_token else 1  # tokens that always stay
        noise = torch.rand(size)
        noise[:, :first] = -1
        order = noise.argsort(1)
        num_keep = first + int((size[1] - first) * (1 - mask_ratio))
        idx_keep = order[:, :num_keep].sort(1).values
        idx_mask = order[:, num_keep:].sort(1).values

    Args:
        size: (B, N).
        mask_ratio: share of the tokens to mask, in [0, 1].
        mask_class_token: False: token 0 is always kept, and the ratio counts the others.
        device: of the result.

    Returns:
        (B, V) and (B, N - V) int64, each ascending.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    Source: Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377), section 3.
    """
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"size: got {size!r}, allowed is (B, N)")
    device = _check.named_device(device)
    for count in size:
        _check.count("size", count, None)
    _check.ratio("mask_ratio", mask_ratio)
    batch, tokens = size
    keep_first = tokens > 0 and not mask_class_token
    num_keep = int((tokens - keep_first) * (1 - mask_ratio)) + keep_first
    noise = torch.rand(batch, tokens, device=device)
    if keep_first:
        noise[:, 0] = -1
    selection = ops.select_tokens(noise, num_masked=tokens - num_keep)
    return selection.ids_visible, selection.ids_masked


# Swapping them in


def patch(model: nn.Module | ModuleType) -> list[str]:
    """Replaces the random masking of a loaded model, and returns the dotted names of what it did.

    Patching twice is patching once; copies and pickles stay patched; `unpatch` takes it back.

    Args:
        model: an `nn.Module`: every ``random_masking(x, mask_ratio)`` in it that masks as MAE's
            does (tried on a small tensor: others return other things under that name), that of
            transformers' ``ViTMAEEmbeddings``, and the forward of timm's ``PatchDropout`` and
            ``PatchDropoutWithIndices``. Or the Python module ``lightly.models.utils``: its
            ``random_token_mask``, but not where that was imported from it before.

    Returns:
        What sma_fast answers now, as ["vit.embeddings.random_masking"].

    Raises:
        TypeError: where `model` is neither.
        ValueError: where there is nothing to replace in it.
    """
    if not isinstance(model, (nn.Module, ModuleType)):
        raise TypeError(f"model: got {type(model).__name__}, allowed is an nn.Module or a module")
    found = []
    for name, owner, attribute, replacement in _replaceable(model):
        if not _is_ours(getattr(owner, attribute)):
            if isinstance(owner, ModuleType):
                owner._before_sma_fast = getattr(owner, attribute)
            setattr(owner, attribute, replacement)
        found.append(f"{name}.{attribute}".lstrip("."))
    if not found:
        raise ValueError(
            f"model: got {getattr(model, '__name__', type(model).__name__)}, allowed is one with "
            "MAE's random_masking(x, mask_ratio) in it, ViTMAEEmbeddings (transformers), "
            "PatchDropout or PatchDropoutWithIndices (timm) or random_token_mask (lightly)"
        )
    return found


def unpatch(model: nn.Module | ModuleType) -> None:
    """Takes back what `patch` replaced in `model`, and returns nothing.

    Args:
        model: as given to `patch`, or a copy of it; what was not patched stays as it is.
    """
    if isinstance(model, ModuleType):
        if hasattr(model, "_before_sma_fast"):
            model.random_token_mask = vars(model).pop("_before_sma_fast")
        return
    for module in model.modules():
        for attribute in ("random_masking", "forward"):
            if _is_ours(vars(module).get(attribute)):
                delattr(module, attribute)


def _replaceable(model: Any) -> Iterator[tuple[str, nn.Module | ModuleType, str, Callable]]:
    # (dotted name of the owner, owner, attribute, replacement). An nn.Module gets functions of this
    # file or partials of them, which pickle and follow a deepcopy: a bound method would not
    if isinstance(model, ModuleType):
        if _same_signature(getattr(model, "random_token_mask", None), lightly_random_token_mask):
            yield model.__name__, model, "random_token_mask", lightly_random_token_mask
        return
    for name, module in model.named_modules():
        if _defined_by(module, "random_masking") == "ViTMAEEmbeddings":
            replacement = functools.partial(_vit_mae_random_masking, config=module.config)
            yield name, module, "random_masking", replacement
        elif _masks_as_mae(getattr(module, "random_masking", None)):
            yield name, module, "random_masking", mae_random_masking
        drops = _defined_by(module, "forward") in ("PatchDropout", "PatchDropoutWithIndices")
        if drops and all(hasattr(module, x) for x in ("prob", "num_prefix_tokens", "ordered")):
            yield name, module, "forward", functools.partial(_patch_dropout, module)


def _defined_by(module: nn.Module, method: str) -> str | None:
    # the name of the class that defines it; None where somebody else's patch hides it
    if method in vars(module) and not _is_ours(vars(module)[method]):
        return None
    return next((c.__name__ for c in type(module).__mro__ if method in vars(c)), None)


def _same_signature(function: Callable | None, ours: Callable) -> bool:
    if not callable(function) or getattr(function, "__defaults__", None) != ours.__defaults__:
        return False
    return [*inspect.signature(function).parameters] == [*inspect.signature(ours).parameters]


def _masks_as_mae(method: Callable | None) -> bool:
    if not _same_signature(method, mae_random_masking):
        return False
    x = torch.arange(1.0, 33.0, device="cpu").reshape(1, 16, 2)
    state = torch.get_rng_state()
    try:
        visible, mask, ids_restore = method(x, 0.5)
        torch.set_rng_state(state)
        ours = mae_random_masking(x, 0.5)[1]
        restored = ops.restore_tokens(visible, ids_restore, x.new_zeros(2))
        return torch.equal(mask, ours) and torch.equal(restored, x * (1 - mask[:, :, None]))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False  # somebody else's method may return anything
    finally:
        torch.set_rng_state(state)


def _vit_mae_random_masking(sequence: Tensor, noise: Tensor | None = None, *, config: Any) -> tuple:
    return hf_random_masking(sequence, noise, mask_ratio=config.mask_ratio)


def _patch_dropout(module: nn.Module, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
    kept = timm_patch_dropout_forward(
        x, module.prob, module.num_prefix_tokens, module.ordered, module.training
    )
    both = getattr(module, "return_indices", False)  # older timm had one class, with a flag
    return kept if both or _defined_by(module, "forward") != "PatchDropout" else kept[0]


def _is_ours(function: Any) -> bool:
    return getattr(getattr(function, "func", function), "__module__", None) == __name__
