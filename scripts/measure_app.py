"""
Measure the page of `diffusionvmr app` through its programming interface, with the server in a process of its own.

`--part times`: the time from the upload of a video to its moments, and that of a second sentence on the same video.

`--part load`: many requests from several clients at once, each with a video that the server does not know. It fails if
an answer is lost or wrong, or if the answers of a client come in another order than its requests. It prints the peak
memory of the server after 10 requests and after all of them (Linux).
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure_long_videos import write_file
from modeling_diffusionvmr.cli.errors import run_safely
from modeling_diffusionvmr.cli.options import EMBEDDED, CommandParser
from modeling_diffusionvmr.synthetic.rendered_world import plan_video, write_video

PARTS, LENGTHS = ["times", "load"], [30, 120, 1200]
FIRST_SEED = 66_000_000
FIRST_REQUESTS = 10  # after which memory is measured for the first time
TIMEOUT = 600  # in seconds


@contextmanager
def server(model: str) -> Iterator[tuple[str, int]]:
    """Run the server. Yield its address and its process id."""
    command = [sys.executable, "-m", "modeling_diffusionvmr", "app", "--model", model, "--num_examples", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        for line in iter(process.stderr.readline, ""):
            said += line
            if match := re.search(r"Open (\S+) in a browser", line):
                yield match[1], process.pid
                return
        raise ValueError(f"the server did not start: {said}")
    finally:
        process.terminate()
        process.wait()


def connect(url: str) -> Any:
    """Return a new client of the server."""
    from gradio_client import Client

    return Client(url, verbose=False)


def measure_times(model: str, lengths: Sequence[int], size: tuple[int, int]) -> None:
    """Print a table of the seconds from the upload of a video to its moments, for videos of some lengths."""
    from gradio_client import handle_file

    print("| video (s) | MB | seconds to moments | seconds for a second sentence |\n| ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder, server(model) as (url, _):
        client = connect(url)
        for length in lengths:
            path = Path(folder) / f"{length}.mp4"
            write_file(path, length, 25, size)
            seconds = []
            for sentence in ("a red circle", "a blue star"):
                start = time.perf_counter()
                client.predict(handle_file(path), [sentence], api_name="/search")
                seconds.append(time.perf_counter() - start)
            print(f"| {length} | {path.stat().st_size / 1e6:.1f} | {seconds[0]:.1f} | {seconds[1]:.2f} |", flush=True)


def measure_load(model: str, num_requests: int, num_clients: int) -> None:
    """Send all requests, and print what became of them."""
    with tempfile.TemporaryDirectory() as folder, server(model) as (url, process):
        requests = []
        for number in range(num_requests):
            plan = plan_video(FIRST_SEED + number)
            requests.append((Path(folder) / f"{number}.mp4", [query.text for query in plan.queries]))
            write_video(plan, requests[-1][0])
        clients = [connect(url) for _ in range(num_clients)]
        first, rest = requests[:FIRST_REQUESTS], requests[FIRST_REQUESTS:]
        start = time.perf_counter()
        send(clients, first)
        before = peak_memory(process)
        send(clients, rest)
        seconds, after = time.perf_counter() - start, peak_memory(process)
    print(
        f"{num_requests} requests from {num_clients} clients: all answered in order, {seconds:.1f} s\n"
        f"peak memory: {before:.0f} MB after {len(first)} requests, {after:.0f} MB after {num_requests} "
        f"({100 * (after / before - 1):+.1f} %)"
    )


def send(clients: Sequence[Any], requests: Sequence[tuple[Path, list[str]]]) -> None:
    """Send requests from all clients at once, each its share in order. Raise `ValueError` if an answer is wrong."""
    with ThreadPoolExecutor(len(clients)) as executor:
        shares = [requests[index :: len(clients)] for index in range(len(clients))]
        for share, answers in zip(shares, executor.map(_send_share, clients, shares)):
            for (path, sentences), rows in zip(share, answers):
                if [row["query"] for row in rows] != sentences:
                    raise ValueError(f"{path.name}: asked for {sentences}, got an answer for {rows}")


def _send_share(client: Any, requests: Sequence[tuple[Path, list[str]]]) -> list[list[dict]]:
    from gradio_client import handle_file

    finished: list[int] = []
    jobs = []
    for number, (path, sentences) in enumerate(requests):
        jobs.append(client.submit(handle_file(path), sentences, api_name="/search"))
        jobs[-1].add_done_callback(lambda _, number=number: finished.append(number))
        while jobs[-1].status().code.name == "STARTING":  # uploads run at the same time: join the queue in order
            time.sleep(0.01)
    answers = [job.result(timeout=TIMEOUT) for job in jobs]
    if finished != sorted(finished):
        raise ValueError(f"the answers came in the order {finished}")
    return answers


def peak_memory(process: int) -> float:
    """Return the peak memory of a process in MB."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text())[1]) / 1e3  # type: ignore[index]


def main(arguments: argparse.Namespace) -> None:
    """Measure the chosen parts."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if "times" in arguments.part:
        measure_times(arguments.model, arguments.lengths, tuple(arguments.size))
    if "load" in arguments.part:
        measure_load(arguments.model, arguments.requests, arguments.clients)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="python scripts/measure_app.py", description=__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: both)")
    parser.add_argument("--model", default=EMBEDDED, help="checkpoint folder or Hub id (default: embedded)")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[30, 120, 1200],
        help="of the videos, in seconds (default: 30 120 1200)",
    )
    parser.add_argument("--size", type=int, nargs=2, default=[1280, 720], help="of their pictures (default: 1280 720)")
    parser.add_argument("--requests", type=int, default=50, help="number of requests (default: 50)")
    parser.add_argument("--clients", type=int, default=8, help="number of clients (default: 8)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_safely(main, parse_arguments())
