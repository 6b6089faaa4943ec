"""`python -m msgdrop_numba` is the `msgdrop` command."""

from __future__ import annotations

import sys

INSTALL = 'msgdrop needs more packages for this: pip install "msgdrop_numba[demo]"'


def main() -> None:
    """Run the command, or say which packages it needs."""
    try:
        from msgdrop_numba import cli
    except ModuleNotFoundError as missing:
        sys.exit(f"{INSTALL} (missing: {missing.name})")
    cli.main(prog_name="msgdrop")


if __name__ == "__main__":
    main()
