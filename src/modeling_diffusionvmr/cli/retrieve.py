"""`diffusionvmr retrieve`: find the moments of a video that sentences describe."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import loading
from .options import (
    CommandParser,
    add_model_arguments,
    add_retrieval_arguments,
    check_output,
    check_retrieval_arguments,
    load_model,
)

COLUMNS = ("start", "end", "score")
PAGE_EXTENSIONS = (".html", ".htm")
PIPELINE_OPTIONS = (
    *("top_k", "threshold", "nms_threshold", "num_proposals", "num_sampling_steps"),
    *("chunk_length_s", "stride_length_s", "max_video_seconds"),
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `diffusionvmr retrieve`."""
    parser = CommandParser(
        "retrieve",
        description="Find the moments of a video that sentences describe.\n"
        "All numbers and thresholds default to those saved with the model.",
    )
    parser.add_argument("video", metavar="VIDEO", help="video file, or its URL")
    parser.add_argument(
        "query", metavar="QUERY", nargs="+", help="sentence; the video is encoded once for all sentences"
    )
    add_model_arguments(parser)
    add_retrieval_arguments(parser)
    parser.add_argument(
        "--chunk_length_s",
        type=float,
        metavar="S",
        help="search longer videos in windows of this many seconds (default: as long as the model reads at once)",
    )
    parser.add_argument(
        "--stride_length_s",
        type=float,
        metavar="S",
        help="leave this many seconds at each side of a window to its neighbor (default: a quarter of the window)",
    )
    parser.add_argument(
        "--max_video_seconds", type=float, metavar="S", help="refuse videos that last longer (default: one day)"
    )
    parser.add_argument("--plot", metavar="OUT.png", help="save a picture of the timeline")
    parser.add_argument("--html", metavar="OUT.html", help="save a web page with the video, which plays the moments")
    parser.add_argument("--cut", metavar="DIR", help="save each moment as a video file")
    parser.add_argument("--json", action="store_true", help="print JSON, with the saliency of each clip")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Print the moments, and save what `--plot`, `--html` and `--cut` ask for."""
    from ..download import fetch
    from ..pipeline_diffusionvmr import VideoMomentRetrievalPipeline

    _check(arguments)
    # `pipeline("video-moment-retrieval")` would report an unusable checkpoint as a traceback
    model, processor = load_model(arguments)
    with loading(model.name_or_path):
        retrieve = VideoMomentRetrievalPipeline(model=model, processor=processor)
    options = {name: getattr(arguments, name) for name in PIPELINE_OPTIONS if getattr(arguments, name) is not None}
    video = fetch(arguments.video, progress=True)  # once: --plot, --html and --cut read it again
    results = retrieve(video, arguments.query, return_saliency=True, progress=True, **options)
    if arguments.json:
        print(json.dumps([{"query": query, **result} for query, result in zip(arguments.query, results)]))
    else:
        print("\n\n".join(_table(query, result["moments"]) for query, result in zip(arguments.query, results)))
    if arguments.plot is not None or arguments.html is not None:
        _save_timelines(arguments, video, results)
    if arguments.cut is not None:
        from ..presentation.cut import cut_moments

        files = cut_moments(video, arguments.query, results, Path(arguments.cut), progress=True)
        print(f"saved {len(files)} files in {arguments.cut}" if files else "no moment to cut", file=sys.stderr)


def _check(arguments: argparse.Namespace) -> None:
    """Raise an error for invalid arguments that would otherwise only fail after the work."""
    from ..checks import check_sentence
    from ..download import URL

    if not URL.match(arguments.video) and not Path(arguments.video).exists():
        raise FileNotFoundError(f"{arguments.video}: no such file")
    for query in arguments.query:
        check_sentence(query)
    check_retrieval_arguments(arguments)
    if arguments.plot is not None:
        from ..plotting import check_picture

        check_picture(arguments.plot, "--plot")
        check_output(arguments.plot, "--plot", is_folder=False)
    if arguments.html is not None:
        if Path(arguments.html).suffix.lower() not in PAGE_EXTENSIONS:
            raise ValueError(f"--html {arguments.html}: the extension must be {' or '.join(PAGE_EXTENSIONS)}")
        check_output(arguments.html, "--html", is_folder=False)
    if arguments.cut is not None:
        check_output(arguments.cut, "--cut")


def _table(query: str, moments: Sequence[Mapping[str, float]]) -> str:
    """Return a sentence and its moments as text, one per line."""
    from ..presentation.timeline import timestamp

    if not moments:
        return f"{query}\n  no moment found"
    rows = [(timestamp(moment["start"]), timestamp(moment["end"]), f"{moment['score']:.3f}") for moment in moments]
    return "\n".join([query, *(f"  {start:>10}  {end:>10}  {score:>5}" for start, end, score in [COLUMNS, *rows])])


def _save_timelines(arguments: argparse.Namespace, video: Any, results: list[dict]) -> None:
    """Save what `--plot` and `--html` ask for."""
    from ..presentation.timeline import frames_of
    from ..video import open_video

    duration = open_video(video, 1.0).duration
    frames = frames_of(video, duration, progress=True)
    if arguments.plot is not None:
        from ..plotting import plot_timeline, save_figure

        save_figure(plot_timeline(arguments.query, results, duration, frames), arguments.plot)
        print(f"saved {arguments.plot}", file=sys.stderr)
    if arguments.html is not None:
        from ..presentation.page import save_page

        url = None if video is arguments.video else arguments.video
        save_page(arguments.html, video, arguments.query, results, duration, frames, url)
        print(f"saved {arguments.html}", file=sys.stderr)
