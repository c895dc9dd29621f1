"""The lock of a directory: who is kept out, who is named, and that nothing of it outlives its holder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from ekd_lightning.runs import lock
from ekd_lightning.runs.lock import LOCK_FILE, DirectoryLock, LockedError, holder, is_held

HOLD = """
import os, sys, time
from pathlib import Path
from ekd_lightning.runs.lock import DirectoryLock
DirectoryLock(Path(sys.argv[1])).acquire()
child = os.fork() if sys.argv[2] == "fork" else os.getpid()
if child == 0 or sys.argv[2] != "fork":  # a child says that it is there once it has let the lock go
    print(os.getpid(), flush=True)
sys.stdin.read()
"""


@contextmanager
def other_process(directory: Path, way: str = "alone"):
    """A process that holds the lock; `fork` gives it a child that lives on."""
    command = [sys.executable, "-c", HOLD, str(directory), way]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process, int(process.stdout.readline())
        process.kill()


def test_one_at_a_time_and_nothing_stays(tmp_path):
    with DirectoryLock(tmp_path):
        assert is_held(tmp_path)
        with pytest.raises(LockedError, match=f"in use by process {os.getpid()} on "):
            DirectoryLock(tmp_path).acquire()
        assert is_held(tmp_path)
    assert not is_held(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with DirectoryLock(tmp_path):
        pass


def test_another_process_is_named_and_its_directory_left_alone(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    with other_process(tmp_path) as (process, _):
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        assert is_held(tmp_path)
        found = holder(tmp_path)
        assert (found.pid, found.command.split()[0]) == (process.pid, "-c")
        with pytest.raises(LockedError) as error:
            DirectoryLock(tmp_path).acquire()
        assert str(error.value) == f"{tmp_path}: in use by {found}"
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert holder(tmp_path) is None


@pytest.mark.parametrize("way", ["alone", "fork"])
def test_a_killed_holder_leaves_no_lock_even_if_its_children_live(tmp_path, way):
    with other_process(tmp_path, way) as (process, child):
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        try:
            assert not is_held(tmp_path)
            with DirectoryLock(tmp_path):
                assert holder(tmp_path).pid == os.getpid()
        finally:
            if way == "fork":
                os.kill(child, signal.SIGKILL)


def test_a_forked_child_neither_keeps_nor_frees_the_lock(tmp_path):
    with DirectoryLock(tmp_path) as held:
        if (child := os.fork()) == 0:
            held.release()
            os._exit(0)
        os.waitpid(child, 0)
        assert is_held(tmp_path)


def test_looking_never_refuses_anybody(tmp_path, monkeypatch):
    (tmp_path / LOCK_FILE).touch()
    file = os.open(tmp_path / LOCK_FILE, os.O_RDONLY)
    fcntl.flock(file, fcntl.LOCK_SH)  # as `is_held` has it for an instant
    monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(file, fcntl.LOCK_UN))
    with DirectoryLock(tmp_path):
        pass
    os.close(file)


def test_a_lock_file_that_its_holder_removes_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    first = DirectoryLock(tmp_path)
    first.acquire()
    monkeypatch.setattr(time, "sleep", lambda _: first.release())
    with DirectoryLock(tmp_path):
        assert is_held(tmp_path)
        with pytest.raises(LockedError):
            DirectoryLock(tmp_path).acquire()


def test_an_empty_directory_that_it_made_goes_again(tmp_path):
    with DirectoryLock(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []
    with DirectoryLock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "x").touch()
    assert list(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "x"]


def test_a_file_in_its_place(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(OSError, match="x"):
        DirectoryLock(tmp_path / "x").acquire()
    assert not is_held(tmp_path / "x")


def test_without_locks_it_warns_once_and_sees_its_own_machine(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(lock, "_warned", set())
    for name in "ab":
        with DirectoryLock(tmp_path / name):
            assert is_held(tmp_path / name)
        assert not is_held(tmp_path / name)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    other = {"pid": os.getppid(), "host": lock.Holder.this().host, "command": "ekd-train"}
    (tmp_path / LOCK_FILE).write_text(json.dumps(other))
    assert is_held(tmp_path)
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 0)
    with pytest.raises(LockedError, match=f"process {os.getppid()} on .*: ekd-train"):
        DirectoryLock(tmp_path).acquire()
    (tmp_path / LOCK_FILE).write_text(json.dumps(other | {"host": "elsewhere"}))
    with DirectoryLock(tmp_path):
        assert is_held(tmp_path)
