"""What becomes of an OUTPUT of `msgdrop apply` when jobs are killed, disks are full and files are damaged."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid

import numpy as np
import psutil
import pytest
from helpers.jobs import files, invoke, job, lines, rng, run, save, serial, two_folders

from msgdrop_numba.command import apply, engines, journal, shards
from msgdrop_numba.command.errors import JobError


@pytest.fixture
def source(tmp_path):
    return two_folders(tmp_path)


# What a killed or failed job leaves behind.


def failing(after):
    """An engine that fails when it has made `after` files."""

    def engine(tasks):
        for number, task in enumerate(tasks):
            if number == after:
                raise JobError("as planned")
            yield task, shards.run(task)

    return engine


def test_a_job_goes_on_where_it_was(source, tmp_path):
    job(source, tmp_path / "expected", epochs=2)
    for done in (0, 2, 4):
        with pytest.raises(JobError, match="as planned"):
            job(source, tmp_path / "out", epochs=2, engine=failing(2 if done else 0))
        assert len(files(tmp_path / "out", but=(apply.LOCK, journal.NAME))) == done
    assert job(source, tmp_path / "out", epochs=2) == 4
    assert files(tmp_path / "out") == files(tmp_path / "expected")


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: (out / "epoch-0/a.npy").unlink(),
        lambda out: (out / "epoch-1/a.npy").write_bytes(b"short"),
        lambda out: (out / journal.NAME).write_text((out / journal.NAME).read_text()[:-20]),
        lambda out: (out / journal.NAME).write_text((out / journal.NAME).read_text()[:20]),
        lambda out: (out / "epoch-0" / f".{uuid.uuid4().hex}{shards.PARTIAL}").write_bytes(b"left by a killed process"),
        lambda out: (out / f".{journal.NAME}{shards.PARTIAL}").write_text("left by a killed process"),
        lambda out: spoil(out / journal.NAME, 3),
    ],
    ids=["missing", "cut", "half a line", "half a header", "a partial file", "half a journal", "a spoilt line"],
)
def test_a_run_again_heals(source, tmp_path, damage):
    job(source, tmp_path / "out", epochs=2)
    whole = files(tmp_path / "out")
    damage(tmp_path / "out")
    if (tmp_path / "out" / journal.NAME).stat().st_size > 20:
        job(source, tmp_path / "out", epochs=2)
        assert files(tmp_path / "out") == whole
    else:
        with pytest.raises(JobError, match="can't be read as a journal"):
            job(source, tmp_path / "out", epochs=2)


def spoil(path, number):
    """A line of zeros, as a lost block leaves it."""
    text = path.read_text().split("\n")
    text[number] = "\0" * len(text[number])
    path.write_text("\n".join(text))


@pytest.mark.parametrize("broken", ["os.fsync", "os.replace"])
def test_a_job_that_ends_before_it_has_a_journal(source, tmp_path, broken, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        with pytest.raises(OSError, match="No space left"):
            job(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != apply.LOCK] == [
        f".{journal.NAME}{shards.PARTIAL}"
    ]
    job(source, tmp_path / "out")
    job(source, tmp_path / "expected")
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_an_input_that_changes_meanwhile(source, tmp_path):
    def changing(tasks):
        for number, task in enumerate(tasks):
            if number == 1:
                os.utime(source / "a.npy", (1, 1))
            yield task, shards.run(task)

    with pytest.raises(JobError, match="has changed while it was read: give another OUTPUT"):
        job(source, tmp_path / "out", engine=changing)


def command(source, output, jobs=2):
    options = ["--p", "0.5", "--seed", "7", "--epochs", "2", "--jobs", str(jobs)]
    return [sys.executable, "-m", "msgdrop_numba", "apply", str(source), str(output), *options]


def marked(mark):
    """The living processes with this environment variable."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MSGDROP_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def gone(mark, seconds=60):
    """Whether all of them end by themselves."""
    end = time.monotonic() + seconds
    while marked(mark):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.processes
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_any_moment(tmp_path, kills):
    source = save(
        tmp_path / "in", **{f"{i:02d}": rng.standard_normal((64, 32, 128)).astype(np.float32) for i in range(20)}
    )
    job(source, tmp_path / "expected", epochs=2)
    expected, moments = files(tmp_path / "expected"), random.Random(kills)
    mark, hit = uuid.uuid4().hex, 0
    for number in range(kills):
        process = subprocess.Popen(
            command(source, tmp_path / "out"), env={**os.environ, "MSGDROP_TEST": mark}, stderr=subprocess.DEVNULL
        )
        until = lines(tmp_path / "out") + 1 + moments.randrange(6)
        end = time.monotonic() + (60 if number % 2 else moments.uniform(0.2, 2.5))  # by progress, and by the clock
        while process.poll() is None and lines(tmp_path / "out") < until and time.monotonic() < end:
            time.sleep(0.001)
        process.kill()
        hit += process.wait() == -signal.SIGKILL
        assert gone(mark)
        for name, data in files(tmp_path / "out").items():
            assert name == journal.NAME or name.endswith(shards.PARTIAL) or data == expected[name]
        if lines(tmp_path / "out"):
            assert apply.verify(tmp_path / "out", lambda count: None).wrong == []
        if hit and number % 4 == 3:
            shutil.rmtree(tmp_path / "out")
    assert hit
    done = subprocess.run(command(source, tmp_path / "out"), check=True, capture_output=True, timeout=120)
    assert done.stderr == b""
    assert files(tmp_path / "out") == expected


@pytest.mark.processes
@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupt_ends_all_processes(tmp_path, jobs):
    source = save(tmp_path / "in", **{f"{i:02d}": np.ones((64, 32, 128), np.float32) for i in range(40)})
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        command(source, tmp_path / "out", jobs),
        env={**os.environ, "MSGDROP_TEST": mark},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and lines(tmp_path / "out") < 3:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.strip()) == (1, "Aborted!")
    assert gone(mark)
    assert not list((tmp_path / "out").rglob(f".*{shards.PARTIAL}"))


@pytest.mark.parametrize(("jobs", "count"), [(1, 3), (8, 1)])
@pytest.mark.parametrize("threads", [None, "3"])
def test_one_process_is_this_one_with_one_thread(jobs, count, threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(engines, "run", lambda task: (task, os.getpid(), os.environ["OMP_NUM_THREADS"]))
    done = list(engines.local(jobs)(list(range(count))))
    assert done == [(task, (task, os.getpid(), "1")) for task in range(count)]
    assert os.environ.get("OMP_NUM_THREADS") == threads


@pytest.mark.processes
def test_a_dead_process_of_the_pool_is_an_error(source, tmp_path):
    def kill_one(tasks):
        for number, done in enumerate(engines.local(2)(tasks * 200)):
            if number == 1:
                for child in psutil.Process().children():
                    if "--multiprocessing-fork" in child.cmdline():
                        child.kill()
            yield done

    with pytest.raises(JobError, match="a process of the job died"):
        job(source, tmp_path / "out", engine=kill_one)


@pytest.mark.processes
def test_one_job_at_a_time(source, tmp_path):
    def meanwhile(tasks):
        done = run("apply", source, tmp_path / "out", "--p", 0.5, "--seed", 7)
        assert (done.returncode, done.stdout) == (1, "")
        assert (
            done.stderr == f"Error: another msgdrop writes to {tmp_path / 'out'}: wait for it, or give another OUTPUT\n"
        )
        return serial(tasks)

    job(source, tmp_path / "out", engine=meanwhile)


@pytest.mark.processes
@pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0, reason="only root may mount a small file system"
)
def test_a_full_disk_is_an_error_that_another_run_heals(tmp_path):
    source = save(tmp_path / "in", a=np.ones((8, 32, 128), np.float32), b=np.ones((8, 32, 128), np.float32))
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", small], check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    try:
        filled = small / "filled"
        filled.write_bytes(bytes(192 * 1024 - 4096 * 2))
        done = run("apply", source, small / "out", "--p", 0.5, "--seed", 7, "--jobs", 1)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert "make room and run the same command again" in done.stderr
        filled.unlink()
        done = run("apply", source, small / "out", "--p", 0.5, "--seed", 7, "--jobs", 1)
        assert (done.returncode, done.stdout) == (1, "")
        assert (
            done.stderr == "Error: b.npy, epoch 0: No space left on device; make room and run the same command again\n"
        )
        assert sorted(files(small / "out")) == ["epoch-0/a.npy", journal.NAME]
        subprocess.run(["mount", "-o", "remount,size=1m", small], check=True)
        assert run("apply", source, small / "out", "--p", 0.5, "--seed", 7, "--jobs", 1).returncode == 0
        job(source, tmp_path / "expected")
        assert files(small / "out") == files(tmp_path / "expected")
    finally:
        subprocess.run(["umount", small], check=True)


# verify


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda out: (out / "epoch-0/a.npy").unlink(), "epoch-0/a.npy is missing"),
        (lambda out: (out / "epoch-0/more.npy").write_bytes(b""), "epoch-0/more.npy is not in the journal"),
        (lambda out: (out / "epoch-0/a.npy").write_bytes(b"short"), "epoch-0/a.npy has changed (5 bytes"),
        (lambda out: flip(out / "epoch-0/b.npy", -1), "epoch-0/b.npy has changed (240 bytes"),
        (lambda out: flip(out / "epoch-0/b.npy", 0), "epoch-0/b.npy has changed (240 bytes"),
        (
            lambda out: (out / "epoch-0/söme/c.npy").write_bytes((out / "epoch-0/a.npy").read_bytes()),
            "epoch-0/söme/c.npy has changed",
        ),
    ],
)
def test_verify(source, tmp_path, damage, said):
    job(source, tmp_path / "out")
    assert apply.verify(tmp_path / "out", lambda count: None) == ([], [])
    damage(tmp_path / "out")
    result = invoke("verify", tmp_path / "out")
    assert result.exit_code == 1
    first, last = result.stderr.splitlines()
    assert said in first
    assert "is not as its journal says: 1 differences" in last


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


def test_verify_of_what_is_not_whole(source, tmp_path):
    with pytest.raises(JobError, match="as planned"):
        job(source, tmp_path / "out", engine=failing(1))
    result = invoke("verify", tmp_path / "out")
    unfinished = f"Error: {tmp_path / 'out'} is unfinished: run the same msgdrop apply again to go on"
    assert (result.exit_code, result.stderr.splitlines()) == (1, ["1 of 4 files are done", unfinished])
    left = f"epoch-0/.{uuid.uuid4().hex}{shards.PARTIAL}"
    for name in (left, "epoch-0/b.npy"):  # of a file half written, and of one that the journal doesn't tell of yet
        (tmp_path / "out" / name).write_bytes(b"")
    said = [f"{left} was left when a job was stopped", "epoch-0/b.npy is not in the journal yet"]
    assert invoke("verify", tmp_path / "out").stderr.splitlines() == ["1 of 4 files are done", *said, unfinished]
    (tmp_path / "out/mine.txt").write_text("")
    result = invoke("verify", tmp_path / "out")
    assert "is not as its journal says: 1 differences" in result.stderr.splitlines()[-1]
    (tmp_path / "out/mine.txt").unlink()
    job(source, tmp_path / "out")
    assert apply.verify(tmp_path / "out", lambda count: None) == ([], [])
    for other in (tmp_path, tmp_path / "nothing"):
        result = invoke("verify", other)
        assert (result.exit_code, "is no output of msgdrop apply" in result.stderr) == (1, True)
    for text in ("no JSON\n", '{"a": 1}\n', '{"files": 1, "parameters": null}\n', "[]\n", ""):
        (tmp_path / journal.NAME).write_text(text)
        assert "can't be read as a journal" in invoke("verify", tmp_path).stderr


def test_verify_of_a_link_that_leads_nowhere(source, tmp_path):
    job(source, tmp_path / "out")
    (tmp_path / "out/epoch-0/a.npy").unlink()
    (tmp_path / "out/epoch-0/a.npy").symlink_to(tmp_path / "nowhere")
    assert len(apply.verify(tmp_path / "out", lambda count: None).wrong) == 1


def test_the_journal_says_what_was_done(source, tmp_path):
    job(source, tmp_path / "out", p=0.25, min_keep=1)
    header, *lines = map(json.loads, (tmp_path / "out" / journal.NAME).read_text().splitlines())
    assert header["contract"] == "1.1"
    assert header["parameters"]["p"] == 0.25
    assert [line["file"] for line in lines] == sorted(line["file"] for line in lines)
    assert {line["file"]: line["bytes"] for line in lines} == {
        name: len(data) for name, data in files(tmp_path / "out", but=(apply.LOCK, journal.NAME)).items()
    }
