"""Example videos, rendered when the server starts."""

from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

from ..synthetic.rendered_world import VideoPlan, absent_queries, plan_video, write_video

FIRST_SEED = 88_000_000  # far from the seeds used for training and evaluation
SHORT = 75.0  # in seconds: rendering takes time
NUM_SENTENCES = 3  # that are true somewhere in the video. One more is true nowhere.


@dataclass(frozen=True)
class Example:
    """
    A video and sentences to search it for.

    Args:
        path: the video file.
        sentences: the last one is true nowhere in the video.
        plan: what the video shows, and when.
    """

    path: Path
    sentences: tuple[str, ...]
    plan: VideoPlan

    @property
    def title(self) -> str:
        """A few words about the video."""
        return f"{self.sentences[0].capitalize()} ({self.plan.duration:.0f} s)"


def render_examples(folder: Path, number: int) -> list[Example]:
    """Render a number of short videos into a folder."""
    plans = (plan for seed in count(FIRST_SEED) if (plan := plan_video(seed)).duration <= SHORT)
    return [_render(plan, folder) for plan in islice(plans, number)]


def _render(plan: VideoPlan, folder: Path) -> Example:
    path = folder / f"{plan.vid}.mp4"
    write_video(plan, path)
    true = [query.text for query in plan.queries[:NUM_SENTENCES]]
    absent = [query.text for query in absent_queries(plan, 0, recombined=True)[:1]]
    return Example(path, (*true, *absent), plan)
