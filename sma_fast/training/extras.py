"""The optional packages that training needs, and what to say where they are missing."""

import importlib


class MissingExtra(ImportError):
    """Raised where a package of the [train] extra is not installed."""


def require(*packages: str) -> None:
    """Raises MissingExtra unless all `packages` can be imported.

    Args:
        packages: names as imported, such as "sklearn".

    Raises:
        MissingExtra: naming what is missing and the command that installs it.
    """
    missing = []
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing.append(f"{name} ({error})")
    if missing:
        raise MissingExtra(f"not installed: {', '.join(missing)}: pip install sma_fast[train]")
