"""Masking schemes, one file each, built from the ops.

For pictures all have one call, ``policy(model, pixels, progress, generator) -> TokenSelection``,
and mask the same number of patches, so that one training loop compares them.
"""

from typing import Any

from sma_fast import _check
from sma_fast.masking.attmask import AttMaskMasking
from sma_fast.masking.hpm import HPMMasking
from sma_fast.masking.random import RandomMasking
from sma_fast.masking.selfmae import SelfMAEMasking

POLICIES = {
    "selfmae": SelfMAEMasking,
    "random": RandomMasking,
    "attmask": AttMaskMasking,
    "attmask-hint": AttMaskMasking,
    "hpm": HPMMasking,
}


def picture_policy(name: str, config: Any, **arguments: Any) -> Any:
    """Returns the policy of that name, for a model of pictures.

    Args:
        name: one of `POLICIES`.
        config: MAEConfig of the model.
        arguments: of the policy's class.

    Returns:
        A callable ``(model, pixels, progress=1.0, generator=None) -> TokenSelection``; where it
        learns (`torch.nn.Module`), ``.loss(output)`` is its own loss.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    _check.choice("name", name, tuple(POLICIES))
    given = {"attmask-hint": {"kind": "hint"}, "hpm": {"width": config.hidden_size}}.get(name, {})
    return POLICIES[name](**(given | arguments))


__all__ = [
    "POLICIES",
    "AttMaskMasking",
    "HPMMasking",
    "RandomMasking",
    "SelfMAEMasking",
    "picture_policy",
]
