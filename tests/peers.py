"""The code that `sma_fast.compat` replaces, loaded from where it is installed."""

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn


def without(reason):
    """Skips, or fails where SMA_FAST_REQUIRE asks for the peers."""
    if "peers" in os.environ.get("SMA_FAST_REQUIRE", "").split(","):
        pytest.fail(reason)
    pytest.skip(reason)


def peer_file(distribution, path):
    """Returns the module in one file of an installed distribution, without importing its package:
    that would need torchvision, which the masking itself does not."""
    try:
        file = importlib.metadata.distribution(distribution).locate_file(path)
    except importlib.metadata.PackageNotFoundError:
        without(f"{distribution} is not installed: pip install --no-deps {distribution}")
    stubs = {
        "torchvision": {},
        "torchvision.ops": {"StochasticDepth": nn.Identity},
        "lightly": {},
        "lightly.utils": {"dependency": None},
    }
    name = "peer_" + Path(path).stem
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, name, module)
        for stub, content in stubs.items():
            patched.setitem(sys.modules, stub, ModuleType(stub))
            vars(sys.modules[stub]).update(content)
        spec.loader.exec_module(module)
    return module
