"""What the tests of `msgdrop apply` share: inputs, a job in this process, the command in another."""

from __future__ import annotations

import subprocess
import sys

import naive
import numpy as np
from click.testing import CliRunner

from msgdrop_numba.call.rule import DEFAULTS, ArrayRule, Rule
from msgdrop_numba.command import apply, inputs, journal, shards
from msgdrop_numba.command.cli import main

rng = np.random.default_rng(5)


def serial(tasks):
    """An engine in this process."""
    return ((task, shards.run(task)) for task in tasks)


def settings(p=0.5, seed=7, columns=None, key=None, ids=None, **told):
    keywords = {name: told.pop(name, default) for name, default in DEFAULTS.items()}
    rule = ArrayRule(None, **keywords) if isinstance(p, str) else Rule(p, **keywords)
    return shards.Settings(p, seed, rule, columns, key, ids, **told)


def job(source, output, epochs=1, engine=serial, **options):
    chosen = settings(**options)
    return apply.make(source, inputs.find(source, chosen), output, chosen, epochs, engine, lambda count: None)


def save(folder, **arrays):
    for name, array in arrays.items():
        path = folder / f"{name.replace('__', '/')}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
    return folder


def files(folder, but=(apply.LOCK,)):
    """All bytes of a folder, by relative path."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in but
    }


def lines(output):
    """How many files the journal of a running job speaks of."""
    path = output / journal.NAME
    return path.read_text().count("\n") if path.exists() else 0


def path_keys(name, rows):
    return [naive.fold_in(naive.hash64(name), row) for row in range(rows)]


def two_folders(tmp_path):
    """Shards in two folders, one with a name that isn't ASCII."""
    x = rng.standard_normal((3, 5, 7, 2)).astype(np.float32)
    return save(tmp_path / "in", a=x[0], b=x[1][:2], **{"söme__c": x[2], "söme__d": x[0][:0]})


X = rng.standard_normal((10, 6, 3)).astype(np.float32)


def run(*arguments, warnings="error", **options):
    return subprocess.run(
        [sys.executable, "-W", warnings, "-m", "msgdrop_numba", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False, **options,
    )  # fmt: skip


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])
