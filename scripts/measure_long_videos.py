"""
Measure a checkpoint on long rendered videos.

`--part curve`: R1@0.5 on videos of one scene, 10 minutes, 1 hour and 2 hours, searched in windows and averaged down.
Only the frames that the backbone reads are rendered, one per clip, and passed to the pipeline uncompressed. Half of the
videos show pairs of a color and a shape that training never shows.

`--part memory` (Linux): peak memory and time for files of 10 s, 10 minutes and 2 hours, each in a process of its own.
"""

import argparse
import itertools
import multiprocessing
import tempfile
import time
from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from modeling_diffusionvmr.cli.errors import run_safely
from modeling_diffusionvmr.cli.options import CommandParser, resolve_model
from modeling_diffusionvmr.synthetic.rendered_world import (
    PAIRS,
    Statement,
    VideoPlan,
    clip_frames,
    plan_long_video,
    plan_video,
    render_frame,
)
from modeling_diffusionvmr.training.moment_quality import match_moments

FIRST_SEED = 60_000_000
LENGTHS = {"one scene": 0.0, "10 min": 600.0, "1 h": 3600.0, "2 h": 7200.0}  # seconds
LONG_MOMENT = 150.0  # seconds: longer than what the model reads at once
WAYS = ("windows", "averaged")
CURVES = tuple(f"{name}, {way}" for way in WAYS for name in ("R1@0.5", "in another scene"))  # % of the sentences
OF_LONG = tuple(f"their R1@0.5, {way}" for way in WAYS)
COLUMNS = ("length", "videos", "sentences", *CURVES, "moments over 150 s", *OF_LONG)
FILES = {"10 s": 10, "10 min": 600, "2 h": 7200}  # seconds
PIECE_SECONDS = 10  # of a file: the same pictures are repeated


def print_header(columns: Sequence[str]) -> None:
    """Print the header of a Markdown table."""
    print_row(columns)
    print("| --- |" + " ---: |" * (len(columns) - 1))


def print_row(cells: Iterable[Any]) -> None:
    """Print a row of a Markdown table, as soon as it is known."""
    texts = (f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells)
    print("| " + " | ".join(texts) + " |", flush=True)


# Retrieval


def draw_plan(index: int, seconds: float) -> VideoPlan:
    """Draw one video. Every other one has unseen pairs."""
    seed, unseen_pairs = FIRST_SEED + index, index % 2 == 1
    return plan_long_video(seed, seconds, unseen_pairs) if seconds else plan_video(seed, unseen_pairs)


def measure_plan(retrieve, plan: VideoPlan) -> list[dict[str, Any]]:
    """Return, per sentence, the length of its longest window, and for each curve whether the best moment counts."""
    video = clip_frames(plan, retrieve.backbones.clip_seconds)
    sentences = [query.text for query in plan.queries]
    rows: list[dict[str, Any]] = [{"longest": max(b - a for a, b in query.windows)} for query in plan.queries]
    for way, options in (("windows", {}), ("averaged", {"chunk_length_s": plan.duration + 1})):
        results = retrieve(video, sentences, top_k=1, threshold=0.0, **options)
        for row, query, (best,) in zip(rows, plan.queries, results):
            windows = {
                "relevant_windows": query.windows,
                "pred_relevant_windows": [[best["start"], best["end"], best["score"]]],
            }
            ((_, row[f"R1@0.5, {way}"]),) = match_moments(windows, None)
            # At no other time of its video is the sentence true, so the best moment is right about the scene or not
            center = (best["start"] + best["end"]) / 2
            row[f"in another scene, {way}"] = bisect(plan.scenes, center) != bisect(plan.scenes, query.windows[0][0])
    return rows


def percent(values: Sequence[bool]) -> float:
    """Return the percentage of true values, NaN if there are none."""
    return 100 * sum(values) / len(values) if values else float("nan")


def measure_length(retrieve, name: str, plans: Sequence[VideoPlan]) -> dict[str, Any]:
    """Return the figures of videos of one length, by the columns of the table."""
    rows = [row for plan in tqdm(plans, desc=name, mininterval=5) for row in measure_plan(retrieve, plan)]
    long = [row for row in rows if row["longest"] > LONG_MOMENT]
    figures: dict[str, Any] = {"length": name, "videos": len(plans), "sentences": len(rows)}
    figures |= {column: percent([row[column] for row in rows]) for column in CURVES}
    figures["moments over 150 s"] = len(long)
    return figures | {column: percent([row[column.removeprefix("their ")] for row in long]) for column in OF_LONG}


def plot_lengths(figures: Mapping[float, Mapping[str, float]], path: Path) -> None:
    """Plot the figures of each length, which is given in minutes."""
    from modeling_diffusionvmr.plotting import plot_curves, save_figure

    curves = {column: {minutes: [of_length[column]] for minutes, of_length in figures.items()} for column in CURVES}
    save_figure(plot_curves(curves, "length of the video (minutes)", "% of sentences"), path)


def measure_curve(model: str, counts: Sequence[int], plot: Path | None) -> None:
    """Print a Markdown table with one row per length, and plot it."""
    from transformers import pipeline

    from modeling_diffusionvmr.modeling_diffusionvmr import TASK

    retrieve = pipeline(TASK, model=model)
    print_header(COLUMNS)
    figures: dict[float, dict[str, Any]] = {}
    for (name, seconds), count in zip(LENGTHS.items(), counts):
        if count:
            plans = [draw_plan(index, seconds) for index in range(count)]
            minutes = round(float(np.mean([plan.duration for plan in plans])) / 60, 1)
            figures[minutes] = measure_length(retrieve, name, plans)
            print_row(figures[minutes].values())
    if plot is not None:
        plot_lengths(figures, plot)
        print(f"saved {plot}")


# Memory and time


def write_file(path: Path, seconds: int, fps: int, size: tuple[int, int]) -> None:
    """Write a video (width, height) that repeats the first seconds of a rendered one, encoded once."""
    import av

    plan = plan_video(FIRST_SEED)
    with av.open(str(path), "w", format="mp4") as container:
        options = {"preset": "ultrafast", "crf": "23", "g": str(PIECE_SECONDS * fps), "bf": "0"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        packets = []
        for number in range(PIECE_SECONDS * fps):
            frame = av.VideoFrame.from_ndarray(render_frame(plan, number / fps), format="rgb24")
            packets += stream.encode(frame.reformat(*size, format="yuv420p"))
        packets += stream.encode()
        contents = [(bytes(packet), packet.pts, packet.is_keyframe, packet.time_base) for packet in packets]
        for piece in range(seconds // PIECE_SECONDS):
            for content, pts, is_keyframe, time_base in contents:
                packet = av.Packet(content)
                packet.stream, packet.time_base, packet.is_keyframe = stream, time_base, is_keyframe
                packet.pts = packet.dts = pts + round(piece * PIECE_SECONDS / time_base)
                container.mux(packet)


def search_file(model: str, path: Path, num_sentences: int) -> tuple[float, float]:
    """Search a file in this process. Return the seconds that it takes and the peak memory in MB."""
    from transformers import pipeline

    from modeling_diffusionvmr.modeling_diffusionvmr import TASK

    retrieve = pipeline(TASK, model=model)
    sentences = [Statement("single", (pair,)).text() for pair in itertools.islice(PAIRS, num_sentences)]
    began = time.perf_counter()
    retrieve(str(path), sentences, return_saliency=True)
    seconds = time.perf_counter() - began
    # Not `ru_maxrss`, which a new process inherits from its parent
    status = Path("/proc/self/status").read_text()
    return seconds, int(status.split("VmHWM:")[1].split()[0]) / 1000


def measure_memory(model: str, lengths: Sequence[str], sentences: int, fps: int, size: tuple[int, int]) -> None:
    """Print a Markdown table with one row per file and number of sentences."""
    columns = ["file", "sentences", "seconds", "seconds per sentence", "share", "peak memory (MB)", "above the first"]
    print_header(columns)
    first_peak = None
    with tempfile.TemporaryDirectory() as folder:
        for name in lengths:
            path = Path(folder) / "video.mp4"
            write_file(path, FILES[name], fps, size)
            per_sentence = []
            for count in (1, sentences):
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
                    seconds, peak = executor.submit(search_file, model, path, count).result()
                first_peak = peak if first_peak is None else first_peak
                per_sentence.append(seconds / count)
                cells = [name, count, f"{seconds:.2f}", f"{per_sentence[-1]:.3f}"]
                cells += [f"{per_sentence[-1] / per_sentence[0]:.3f}", f"{peak:.0f}", f"{peak - first_peak:.0f}"]
                print_row(cells)


def main(arguments: argparse.Namespace) -> None:
    """Run one part, or both."""
    model = resolve_model(arguments.model)
    if len(arguments.videos) != len(LENGTHS) or min(arguments.videos) < 0:
        raise ValueError(f"--videos must be {len(LENGTHS)} numbers, one per length, got {arguments.videos}")
    if not 1 <= arguments.sentences <= len(PAIRS):
        raise ValueError(f"--sentences must be between 1 and {len(PAIRS)}, got {arguments.sentences}")
    if min(arguments.fps, *arguments.size) < 1:
        raise ValueError("--fps and --size must be at least 1")
    if arguments.plot is not None:
        from modeling_diffusionvmr.plotting import check_picture

        check_picture(arguments.plot, "--plot")
    if arguments.part in ("curve", "all"):
        measure_curve(model, arguments.videos, arguments.plot)
    if arguments.part in ("memory", "all"):
        measure_memory(model, arguments.files, arguments.sentences, arguments.fps, arguments.size)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="python scripts/measure_long_videos.py", description=__doc__)
    parser.add_argument("--model", help="checkpoint folder or Hub id (default: embedded, the model in this package)")
    parser.add_argument("--part", choices=("curve", "memory", "all"), default="all", help="what to measure")
    parser.add_argument(
        "--videos",
        type=int,
        nargs="+",
        default=[100, 20, 6, 2],
        metavar="N",
        help=f"number of videos of each length ({', '.join(LENGTHS)}; default: 100 20 6 2)",
    )
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="save the curve as a picture")
    parser.add_argument(
        "--files", nargs="+", choices=list(FILES), default=list(FILES), help="lengths of the files for --part memory"
    )
    parser.add_argument("--sentences", type=int, default=100, help="number of sentences beside 1 (default: 100)")
    parser.add_argument("--fps", type=int, default=25, help="frames per second of the files (default: 25)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=[1280, 720], metavar=("W", "H"), help="of the files (default: 1280 720)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_safely(main, parse_arguments())
