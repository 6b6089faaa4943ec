"""Which extra brings a package that is missing. Imports nothing, so that it can always be told."""

from __future__ import annotations

# What isn't named here comes with [cli].
_EXTRAS = {"torch": "torch", "ray": "ray", "matplotlib": "plot", "sktime": "demo"}


def install_line(module: str | None) -> str:
    """What to say where a module is missing."""
    package = (module or "").partition(".")[0]
    extra = _EXTRAS.get(package, "cli")
    return f'msgdrop needs {package} for this: pip install "msgdrop_numba[{extra}]"'
