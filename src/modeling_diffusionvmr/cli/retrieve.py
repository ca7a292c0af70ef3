"""`diffusionvmr retrieve`: find the moments of a video that sentences describe."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import loading
from .options import (
    CommandParser,
    add_model_arguments,
    add_retrieval_arguments,
    check_output,
    check_retrieval_arguments,
    load_model,
)

NUM_FRAMES = 12  # number of frames below the timeline
PIPELINE_OPTIONS = ("top_k", "threshold", "nms_threshold", "num_proposals", "num_sampling_steps")


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
    parser.add_argument("--num_proposals", type=int, metavar="N", help="number of spans drawn from noise")
    add_retrieval_arguments(parser)
    parser.add_argument("--plot", metavar="OUT.png", help="save a picture of the timeline")
    parser.add_argument("--json", action="store_true", help="print JSON, with the saliency of each clip")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Print the moments, and plot them with `--plot`."""
    from ..download import fetch
    from ..pipeline_diffusionvmr import VideoMomentRetrievalPipeline

    _check(arguments)
    # `pipeline("video-moment-retrieval")` would report an unusable checkpoint as a traceback
    model, processor = load_model(arguments)
    with loading(model.name_or_path):
        retrieve = VideoMomentRetrievalPipeline(model=model, processor=processor)
    options = {name: getattr(arguments, name) for name in PIPELINE_OPTIONS if getattr(arguments, name) is not None}
    arguments.video = fetch(arguments.video, progress=True)  # here, since the plot reads the video as well
    results = retrieve(arguments.video, arguments.query, return_saliency=True, progress=True, **options)
    if arguments.json:
        print(json.dumps([{"query": query, **result} for query, result in zip(arguments.query, results)]))
    else:
        for query, result in zip(arguments.query, results):
            print(query)
            for moment in result["moments"]:
                print(f"  {moment['start']:8.2f} s - {moment['end']:8.2f} s   score {moment['score']:.3f}")
            if not result["moments"]:
                print("  no moment found")
    if arguments.plot is not None:
        _plot(arguments, results)


def _check(arguments: argparse.Namespace) -> None:
    """Raise an error for invalid flags that would otherwise only fail after the work is done."""
    from ..checks import check_sentence
    from ..download import URL

    if not URL.match(arguments.video) and not Path(arguments.video).exists():
        raise FileNotFoundError(f"{arguments.video}: no such file")
    for query in arguments.query:
        check_sentence(query)
    check_retrieval_arguments(arguments, [] if arguments.num_proposals is None else [arguments.num_proposals])
    if arguments.plot is not None:
        from ..plotting import check_picture

        check_picture(arguments.plot, "--plot")
        check_output(arguments.plot, "--plot", is_folder=False)


def _plot(arguments: argparse.Namespace, results: list[dict]) -> None:
    from ..plotting import plot_timeline, save_figure
    from ..video import open_video

    duration = open_video(arguments.video, 1.0).duration
    frames = list(open_video(arguments.video, duration / NUM_FRAMES))
    save_figure(plot_timeline(arguments.query, results, duration, frames), arguments.plot)
    print(f"saved {arguments.plot}", file=sys.stderr)
