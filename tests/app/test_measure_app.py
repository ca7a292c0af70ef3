"""`scripts/measure_app.py`, in small."""

import os
import sys
from contextlib import contextmanager

import pytest

import measure_app as script


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_both_parts(capsys, monkeypatch, app):
    """With the server of the other tests, which runs in this process."""

    @contextmanager
    def server(model):
        yield app.url, os.getpid()

    monkeypatch.setattr(script, "server", server)
    monkeypatch.setattr(script, "FIRST_REQUESTS", 2)
    options = ["--lengths", "10", "--size", "160", "120", "--requests", "3", "--clients", "2"]
    script.main(script.parse_arguments(options))
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].startswith("| 10 | ")
    assert printed[3].startswith("3 requests from 2 clients: all answered in order, ")
    assert printed[4].startswith("peak memory: ") and "after 2 requests" in printed[4]


class Client:
    """A client whose answers come in the order that a test wants."""

    def __init__(self, answers, order):
        self.answers, self.order, self.jobs = answers, order, []

    def submit(self, video, sentences, api_name):
        job = Job(self.answers[len(self.jobs)])
        self.jobs.append(job)
        if len(self.jobs) == len(self.answers):
            self.jobs[0].before_result = lambda: [self.jobs[number].callback(None) for number in self.order]
        return job


class Job:
    def __init__(self, answer):
        self.answer = answer
        self.before_result = lambda: None

    def add_done_callback(self, callback):
        self.callback = callback

    def status(self):
        return type("Status", (), {"code": type("Code", (), {"name": "PENDING"})})

    def result(self, timeout):
        self.before_result()
        return self.answer


def rows(*sentences):
    return [{"query": sentence} for sentence in sentences]


@pytest.mark.parametrize(
    "answers, order, message",
    [
        ([rows("a"), rows("b")], [0, 1], None),
        ([rows("a"), rows("b")], [1, 0], r"in the order \[1, 0\]"),
        ([rows("a"), rows("a")], [0, 1], "asked for"),
    ],
)
def test_lost_or_swapped_answers_are_found(tmp_path, answers, order, message):
    requests = [(tmp_path / "0.mp4", ["a"]), (tmp_path / "1.mp4", ["b"])]
    for path, _ in requests:
        path.touch()
    client = Client(answers, order)
    if message is None:
        script.send([client], requests)
        return
    with pytest.raises(ValueError, match=message):
        script.send([client], requests)
