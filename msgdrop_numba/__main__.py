"""`python -m msgdrop_numba` is the `msgdrop` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command, or say which packages it needs."""
    try:
        from msgdrop_numba import cli
    except ModuleNotFoundError as missing:
        sys.exit(f'msgdrop needs more packages: pip install "msgdrop_numba[demo]" (missing: {missing.name})')
    cli.main(prog_name="msgdrop")


if __name__ == "__main__":
    main()
