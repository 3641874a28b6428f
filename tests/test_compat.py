"""All drop-ins: wrong arguments, and what importing them loads."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sma_fast
from sma_fast import compat


@pytest.mark.parametrize(
    ("function", "arguments", "error", "name"),
    [
        ("mae_random_masking", (torch.zeros(3), 0.5), ValueError, "x"),
        ("mae_random_masking", (torch.zeros(1, 3, 2), 1.5), ValueError, "mask_ratio"),
        ("mae_random_masking", (None, 0.5), TypeError, "x"),
        ("hf_random_masking", (torch.zeros(3),), ValueError, "sequence"),
        ("hf_random_masking", (torch.zeros(1, 3, 2), torch.rand(1, 4)), ValueError, "noise"),
        (
            "hf_random_masking",
            (torch.zeros(1, 3, 2), torch.zeros(1, 3, dtype=torch.int64)),
            TypeError,
            "noise",
        ),
        ("timm_patch_dropout_forward", (torch.zeros(3), 0.5, 1, False, True), ValueError, "x"),
        (
            "timm_patch_dropout_forward",
            (torch.zeros(1, 3, 2), -0.5, 1, False, True),
            ValueError,
            "prob",
        ),
        (
            "timm_patch_dropout_forward",
            (torch.zeros(1, 3, 2), 0.5, -1, False, True),
            ValueError,
            "num_prefix_tokens",
        ),
        ("lightly_random_token_mask", (5,), TypeError, "size"),
        ("lightly_random_token_mask", ((2, -1),), ValueError, "size"),
        ("lightly_random_token_mask", ((2, 3.0),), TypeError, "size"),
        ("lightly_random_token_mask", ((2, 3), 2.0), ValueError, "mask_ratio"),
        ("lightly_random_token_mask", ((2, 3), 0.6, False, "nope"), ValueError, "device"),
        ("lightly_random_token_mask", ((2, 3), 0.6, False, 3.5), TypeError, "device"),
    ],
)
def test_wrong_arguments(function, arguments, error, name):
    with pytest.raises(error, match=f"^{name}: "):
        getattr(compat, function)(*arguments)


def test_importing_needs_none_of_the_peers():
    code = (
        "import sys, sma_fast.compat; "
        "print([m for m in ('transformers', 'timm', 'lightly', 'torchvision') if m in sys.modules])"
    )
    root = Path(sma_fast.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr
