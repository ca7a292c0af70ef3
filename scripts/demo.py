"""
Render a new video, retrieve the moments of three sentences with the embedded model, and plot them beside the true
moments. `make demo` runs this script.
"""

import argparse
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import torch
from transformers import pipeline

from modeling_diffusionvmr import DEFAULT_MODEL, open_video
from modeling_diffusionvmr.cli.errors import run_safely
from modeling_diffusionvmr.cli.options import CommandParser
from modeling_diffusionvmr.presentation.timeline import frames_of
from modeling_diffusionvmr.synthetic.rendered_world import Query, VideoPlan, plan_video, write_video

FIRST_SEED = 77_000_000  # far from the seeds used for training and evaluation
NUM_QUERIES = 3


def choose_plan(first_seed: int) -> tuple[VideoPlan, list[Query]]:
    """Return a plan and three of its sentences, from the first seed for which a sentence has several moments."""
    for seed in count(first_seed):
        plan = plan_video(seed)
        queries = sorted(plan.queries, key=lambda query: -len(query.windows))[:NUM_QUERIES]
        if len(queries) == NUM_QUERIES and len(queries[0].windows) > 1:
            return plan, queries


def main(arguments: argparse.Namespace) -> None:
    """Run the demo and write video and plots to `--output_dir`."""
    # Here, so that a missing Matplotlib is one line that says how to install it
    from modeling_diffusionvmr.plotting import plot_refinement, plot_timeline, save_figure

    if arguments.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {arguments.seed}")
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    plan, queries = choose_plan(arguments.seed)
    path = folder / "video.mp4"
    write_video(plan, path)
    print(f"rendered {path}, {plan.duration:.1f} s")

    retrieve = pipeline("video-moment-retrieval", model=DEFAULT_MODEL)
    sentences = [query.text for query in queries]
    results = retrieve(str(path), sentences, return_saliency=True)
    for query, result in zip(queries, results):
        print(f"\n{query.text}")
        print("  true:      " + ", ".join(f"{start:.1f} - {end:.1f} s" for start, end in query.windows))
        found = (f"{m['start']:.1f} - {m['end']:.1f} s ({m['score']:.2f})" for m in result["moments"])
        print("  retrieved: " + (", ".join(found) or "nothing"))

    truth = [query.windows for query in queries]
    frames = frames_of(str(path), plan.duration)
    save_figure(plot_timeline(sentences, results, plan.duration, frames, truth), folder / "timeline.png")

    video = open_video(path, retrieve.backbones.clip_seconds)
    features = retrieve.backbones.encode_video(video), retrieve.backbones.encode_text(sentences[:1])
    with torch.inference_mode():
        # One step, since the last of several does not start from noise
        outputs = retrieve.model(**retrieve.processor([features[0]], features[1]), num_sampling_steps=1)
    figure = plot_refinement(
        outputs.intermediate_spans[0],
        outputs.logits[0].softmax(-1)[:, 0],
        video.num_clips * video.clip_seconds,
        truth[0],
        f"“{sentences[0]}”: spans refined from noise (green: truth)",
    )
    save_figure(figure, folder / "refinement.png")
    print(f"\nsaved {folder / 'timeline.png'} and {folder / 'refinement.png'}")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="python scripts/demo.py", description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("demo"), help="folder to write (default: demo)")
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help=f"seed of the video (default: {FIRST_SEED})")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_safely(main, parse_arguments())
