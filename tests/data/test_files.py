import fcntl
import json
import multiprocessing
import os
import signal
import threading
from contextlib import contextmanager

import pytest

from modeling_diffusionvmr.data import files
from modeling_diffusionvmr.data.files import atomic_write, load_jsonl, locked, move_into_place, save_jsonl, staging

ROW = {"qid": 1, "query": "a dog runs", "vid": "v1", "duration": 20, "relevant_windows": [[2, 6], [8.5, 20]]}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_saved_rows(tmp_path):
    path = tmp_path / "new" / "predictions.jsonl"
    save_jsonl([ROW, {"qid": "ä"}], path)
    assert load_jsonl(path) == [ROW, {"qid": "ä"}]


def test_nothing_half_written(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW)
    with pytest.raises(ValueError):
        save_jsonl([{**ROW, "qid": 2}, {"score": float("nan")}], path)
    assert load_jsonl(path) == [ROW]
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() != "half"
        raise RuntimeError
    assert load_jsonl(path) == [ROW]
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_the_disk_before_it_is_renamed_and_the_name_after(tmp_path, monkeypatch):
    events = []
    replace, names = os.replace, {}

    def record(file):
        events.append(names[os.fstat(file).st_ino])

    def record_replace(source, target):
        events.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", record_replace)
    names[tmp_path.stat().st_ino] = "."
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("all")
        names[temporary.stat().st_ino] = "a.txt"
    assert events == ["a.txt", "renamed", "."]
    events.clear()
    (tmp_path / "new/inside").mkdir(parents=True)
    (tmp_path / "new/inside/b.txt").write_text("all")
    names |= {path.stat().st_ino: path.name for path in (tmp_path / "new").rglob("*")}
    names[(tmp_path / "new").stat().st_ino] = "new"
    move_into_place(tmp_path / "new", tmp_path / "moved")
    assert events == ["inside", "b.txt", "new", "renamed", "."]
    assert (tmp_path / "moved/inside/b.txt").read_text() == "all"


def test_a_full_disk_is_noticed_before_the_file_is_renamed(tmp_path, monkeypatch):
    def fail(file):
        raise OSError(28, "No space left on device")

    path = write(tmp_path / "a.jsonl", ROW)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_jsonl([], path)
    assert load_jsonl(path) == [ROW] and list(tmp_path.iterdir()) == [path]


# Several processes


@contextmanager
def another_process(hold, path):
    """Run `hold(path)` in another process until its block; yield a function that lets it go on, and the process."""
    context = multiprocessing.get_context("fork")
    ready, goes_on = context.Event(), context.Event()

    def run():
        with hold(path) as temporary:
            if isinstance(temporary, os.PathLike):
                temporary.write_text("theirs")
            ready.set()
            goes_on.wait(60)

    process = context.Process(target=run)
    process.start()
    try:
        assert ready.wait(60)
        yield goes_on.set, process
    finally:
        process.kill()
        process.join()


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    path = tmp_path / "a.txt"
    with another_process(atomic_write, path) as (_, process):
        kill(process)
    assert len(list(tmp_path.iterdir())) == 2  # the lock and the half-written file
    with atomic_write(path) as temporary:
        assert not temporary.exists()
        temporary.write_text("ours")
    assert path.read_text() == "ours" and list(tmp_path.iterdir()) == [path]


def test_two_processes_write_the_same_file_one_after_the_other(tmp_path):
    path = tmp_path / "a.txt"
    with another_process(atomic_write, path) as (go_on, process):

        def write_ours():
            with atomic_write(path) as temporary:
                before.append(path.read_text())
                temporary.write_text("ours")

        before = []
        waiting = threading.Thread(target=write_ours)
        waiting.start()
        with pytest.raises(BlockingIOError, match="^in use$"), staging(path, "in use"):
            pass
        go_on()
        process.join()
        waiting.join(60)
        assert process.exitcode == 0 and before == ["theirs"]
    assert path.read_text() == "ours" and list(tmp_path.iterdir()) == [path]


def test_a_lock_ends_with_its_process_even_if_that_has_started_others(tmp_path):
    path = tmp_path / "lock"

    @contextmanager
    def hold(path):
        with locked(path, "in use"):
            outlives = multiprocessing.get_context("fork").Process(target=signal.pause)
            outlives.start()
            (tmp_path / "pid").write_text(str(outlives.pid))
            yield

    with another_process(hold, path) as (_, process):
        try:
            with pytest.raises(BlockingIOError, match="in use"), locked(path, "in use"):
                pass
            kill(process)
            with locked(path, "in use") as is_locked:
                assert is_locked
            assert not path.exists()
        finally:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("reason", ["platform", "file system"])
def test_files_are_written_where_they_cannot_be_locked(tmp_path, monkeypatch, reason):
    def fail(*arguments):
        raise OSError(38, "Function not implemented")

    if reason == "platform":
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", fail)
    path = tmp_path / "a.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("all")
    assert path.read_text() == "all" and list(tmp_path.iterdir()) == [path]
