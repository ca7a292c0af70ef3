"""Measure time and memory, load official code, and print tables: what several parts of `benchmark.py` need."""

import contextlib
import importlib
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import psutil
import torch


def peak_mib() -> float:
    """Return the peak memory of this process so far, without its children."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def resident_mib() -> float:
    """Return the memory that this process uses now."""
    return psutil.Process().memory_info().rss / 2**20


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def alternate(jobs: dict[str, Callable], repeats: int) -> dict[str, tuple]:
    """
    Run each job `repeats` times. The jobs take turns, so that other load on the machine affects all of them alike.

    Returns:
        For each job its median seconds, the peak MiB of the process after its first run, and its result.
    """
    seconds, peaks, results = {name: [] for name in jobs}, {}, {}
    for _ in range(repeats):
        for name, job in jobs.items():
            started = time.perf_counter()
            results[name] = job()
            seconds[name].append(time.perf_counter() - started)
            peaks.setdefault(name, peak_mib())
    return {name: (statistics.median(seconds[name]), peaks[name], results[name]) for name in jobs}


class Clock:
    """Measures seconds by name. Unlike training itself, it waits for the device before and after each measurement."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, name: str):
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] += time.perf_counter() - started

    def _wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def inside(self, module, function_name: str, name: str):
        """Measure every call of a module's function inside the block."""
        function = getattr(module, function_name)

        def measured(*args, **kwargs):
            with self(name):
                return function(*args, **kwargs)

        setattr(module, function_name, measured)
        try:
            yield
        finally:
            setattr(module, function_name, function)


def official_module(checkout: str, name: str) -> ModuleType:
    """Import a module from a checkout of github.com/jayleicn/moment_detr. Raise ValueError if it has no such module."""
    file = f"{name.replace('.', '/')}.py"
    if not (Path(checkout) / file).is_file():
        raise ValueError(f"{checkout}: not a checkout of moment_detr (it has no {file})")
    sys.path.insert(0, str(Path(checkout).resolve()))
    return importlib.import_module(name)


def print_table(rows: list[dict]) -> None:
    """Print rows with the same columns as a Markdown table."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for index, row in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
        if index == 0:
            print("| " + " | ".join("-" * width for width in widths) + " |")
