"""sma-fast show of masked autoencoders: what is drawn is what the policy masks."""

import numpy as np
import pytest
import torch
from test_training_mae import SIZES

from sma_fast.masking import SelfMAEMasking, picture_policy
from sma_fast.models import MAEConfig, MAEForPretraining
from sma_fast.training import show_mae


@pytest.mark.parametrize("mask", ["selfmae", "attmask"])
def test_what_is_shown_is_what_the_policy_masks(mask: str) -> None:
    torch.manual_seed(0)
    model = MAEForPretraining(MAEConfig.preset("mae-32", **SIZES)).eval()
    pixels = torch.randn(3, 3, 8, 8)
    policy = picture_policy(mask, model.config)
    given = torch.Generator().manual_seed(1)
    expected = policy(model, pixels, 0.9, given).mask
    found = show_mae.look(
        *(model, pixels, policy, lambda x: x.permute(0, 2, 3, 1).sigmoid().numpy(), 0.9),
        torch.Generator().manual_seed(1),
    )
    assert (found.mask == expected.numpy()).all() and np.isfinite(found.loss).all()
    masked = next(panel for panel in found.panels if panel.label.startswith("masked"))
    black = (masked.images == 0).all(3)[:, ::2, ::2].reshape(3, 16)  # a corner of each patch
    assert (black == found.mask).all()
    alone = show_mae.look(model, pixels[:1], policy, lambda x: x.permute(0, 2, 3, 1).numpy(), 0.0)
    assert len(alone.panels) == len(found.panels)


def test_what_is_shown_of_pictures_that_are_not_cut() -> None:
    torch.manual_seed(0)
    model = MAEForPretraining(MAEConfig.preset("mae-32", **SIZES)).eval()
    pixels = torch.randn(3, 3, 8, 8)
    policy = SelfMAEMasking(iterations=1, mask_ratio=0.5)
    assert not policy.scores(model, pixels).any()
    found = show_mae.look(model, pixels, policy, lambda x: x.permute(0, 2, 3, 1).numpy())
    images = {panel.label.split("\n")[0]: panel.images for panel in found.panels}
    assert (images["informed mask"] == images["picture"]).all() and not images["score"].any()
    shown = images["masked: 10% of what is"]
    assert ((shown == images["picture"]) | (shown == 0)).all()  # no patch is orange
    cut = SelfMAEMasking(mask_ratio=0.5)
    found = show_mae.look(model, pixels, cut, lambda x: x.permute(0, 2, 3, 1).numpy())
    informed = next(panel for panel in found.panels if panel.label.startswith("informed"))
    assert ((informed.images == 0).all(3).mean((1, 2)) == 0.5).all()
