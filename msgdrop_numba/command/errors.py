"""Errors of the `msgdrop` command: one line that says what to do."""

from __future__ import annotations

import errno


class JobError(Exception):
    """An error in one line that says what to do."""


def one_line(error: BaseException) -> str:
    """The text of an error without line breaks; of the system's errors, the text and the file."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return f"{text}; make room and run the same command again" if full else text
    return " ".join(str(error).split()) or type(error).__name__
