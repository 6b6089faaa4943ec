"""The journal of an OUTPUT: a line of JSON for the job, and one for each whole file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from msgdrop_numba.command.errors import JobError
from msgdrop_numba.command.shards import PARTIAL, Written, sync_folder

NAME = "journal.jsonl"


class Journal:
    """The journal of a folder, for the one process that holds its lock.

    Args:
        folder: the OUTPUT.
        header: what the job is. A journal of another job is refused; one of fewer epochs goes on.

    Raises:
        JobError: the folder's journal is of another job or of more epochs, or can't be read.
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.path = folder / NAME
        self.header = json.loads(json.dumps(header))  # as it will be read
        found, self.written = read(folder)
        if found:
            self._compare(found)
        self._rewrite()  # without what a killed job left of a line

    def _compare(self, found: dict[str, Any]) -> None:
        output, (before, now) = self.path.parent, (_flat(found), _flat(self.header))
        for name, value in now.items():
            if json.dumps(before.get(name)) != json.dumps(value):  # a fill may be NaN, which is equal to nothing
                said = f"its {name} is {before.get(name)!r}, not {value!r}"
                said = "its input has changed since" if name == "input" else said
                raise JobError(f"{output} belongs to another job: {said}; give another OUTPUT")
        epochs, wanted = found["epochs"], self.header["epochs"]
        if epochs > wanted:
            raise JobError(
                f"{output} is of {epochs} epochs, and can't become one of {wanted}: give --epochs {epochs} or more; "
                f"what --epochs {wanted} makes are its folders epoch-0 to epoch-{wanted - 1}"
            )

    def add(self, name: str, written: Written) -> None:
        """Note a file that is whole."""
        self.written[name] = written
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(name, written))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Put the lines in order, so that equal jobs leave equal journals."""
        self._rewrite()

    def _rewrite(self) -> None:
        text = (
            json.dumps(self.header) + "\n" + "".join(_line(name, self.written[name]) for name in sorted(self.written))
        )
        partial = self.path.with_name(f".{NAME}{PARTIAL}")
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)
        sync_folder(self.path.parent)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Written]]:
    """The header and the files of a journal, empty where there is none. A killed job may have left half a line.

    Raises:
        JobError: it is no journal.
    """
    if not (folder / NAME).exists():
        return {}, {}
    header, _, rest = (folder / NAME).read_text(encoding="utf-8", errors="replace").partition("\n")
    try:
        facts = json.loads(header)
        int(facts["files"]), int(facts["epochs"]), dict(facts["parameters"])
    except (ValueError, LookupError, TypeError) as error:
        raise JobError(f"{folder / NAME} can't be read as a journal: give another OUTPUT") from error
    written: dict[str, Written] = {}
    for line in rest.split("\n")[:-1]:
        try:
            record = json.loads(line)
            written[record["file"]] = Written(int(record["bytes"]), str(record["xxh3"]))
        except (ValueError, LookupError, TypeError):  # lost with the power: what follows is made again
            break
    return facts, written


def _line(name: str, written: Written) -> str:
    return json.dumps({"file": name, **written._asdict()}) + "\n"


def _flat(header: dict[str, Any]) -> dict[str, Any]:
    """The entries that may never differ, the parameters first, because they explain a difference best."""
    growing = ("parameters", "epochs", "files")
    return {**header["parameters"], **{k: v for k, v in header.items() if k not in growing}}
