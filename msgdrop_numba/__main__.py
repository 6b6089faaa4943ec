"""`python -m msgdrop_numba` is the `msgdrop` command."""

from __future__ import annotations

import sys

# The extra that brings a package; what isn't named here comes with [cli].
_EXTRAS = {"torch": "torch", "ray": "ray", "matplotlib": "plot", "sktime": "demo"}


def install_line(module: str | None) -> str:
    """What to say where a module is missing."""
    package = (module or "").partition(".")[0]
    extra = _EXTRAS.get(package, "cli")
    return f'msgdrop needs {package} for this: pip install "msgdrop_numba[{extra}]"'


def main() -> None:
    """Run the command, or say which packages it needs."""
    try:
        from msgdrop_numba import cli
    except ModuleNotFoundError as missing:
        sys.exit(f"Error: {install_line(missing.name)}")
    cli.main(prog_name="msgdrop")


if __name__ == "__main__":
    main()
