"""`python -m msgdrop_numba` is the `msgdrop` command."""

from __future__ import annotations

import sys

from msgdrop_numba.command.install import install_line


def main() -> None:
    """Run the command, or say which packages it needs."""
    try:
        from msgdrop_numba.command import cli
    except ModuleNotFoundError as missing:
        sys.exit(f"Error: {install_line(missing.name)}")
    cli.main(prog_name="msgdrop")


if __name__ == "__main__":
    main()
