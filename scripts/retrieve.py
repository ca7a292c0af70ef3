"""Moments of a video that sentences describe: `python scripts/retrieve.py VIDEO QUERY [QUERY ...]`."""

import argparse
import json
import sys

from transformers import pipeline

from modeling_diffusionvmr.cli.options import add_model_arguments, resolve_model, run_safely
from modeling_diffusionvmr.video import open_video

NUM_FRAMES = 12


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("video", help="a video file")
    parser.add_argument("query", nargs="+", help="a sentence; several search the video in one pass")
    add_model_arguments(parser)
    parser.add_argument("--top_k", type=int, default=5, help="moments a query at most (default: 5)")
    parser.add_argument("--threshold", type=float, help="least score of a moment")
    parser.add_argument("--nms_threshold", type=float, help="drop a moment whose IoU with a better one is above it")
    parser.add_argument("--num_proposals", type=int, help="spans that are drawn from noise")
    parser.add_argument("--num_sampling_steps", type=int, help="DDIM steps")
    parser.add_argument("--plot", metavar="OUT.png", help="save a timeline picture")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    resolve_model(arguments.model)
    retrieve = pipeline(
        "video-moment-retrieval", model=arguments.model, trust_remote_code=arguments.trust_remote_code or None
    )
    names = ("top_k", "threshold", "nms_threshold", "num_proposals", "num_sampling_steps")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    results = retrieve(arguments.video, arguments.query, return_saliency=True, progress=True, **given)
    if arguments.json:
        print(json.dumps([{"query": query, **result} for query, result in zip(arguments.query, results)]))
    else:
        for query, result in zip(arguments.query, results):
            print(query)
            for moment in result["moments"]:
                print(f"  {moment['start']:8.2f} s - {moment['end']:8.2f} s   score {moment['score']:.3f}")
    if arguments.plot:
        from modeling_diffusionvmr.plotting import plot_timeline, save_figure

        duration = open_video(arguments.video, 1.0).duration
        frames = list(open_video(arguments.video, duration / NUM_FRAMES))
        save_figure(plot_timeline(arguments.query, results, duration, frames), arguments.plot)
        print(f"saved {arguments.plot}", file=sys.stderr)


if __name__ == "__main__":
    run_safely(main, parse_arguments())
