"""The extra that brings a missing package. Imports nothing, so that it always works."""

from __future__ import annotations

# What isn't named here comes with [cli].
_EXTRAS = {"torch": "torch", "ray": "ray", "matplotlib": "plot", "sktime": "demo"}


def install_line(module: str | None) -> str:
    """The advice for a missing module."""
    package = (module or "").partition(".")[0]
    extra = _EXTRAS.get(package, "cli")
    return f'msgdrop needs {package} for this: pip install "msgdrop_numba[{extra}]"'
