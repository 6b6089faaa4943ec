"""`python -m msgdrop_numba` is the `msgdrop` command."""

from msgdrop_numba.cli import main

main(prog_name="msgdrop")
