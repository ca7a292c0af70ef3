"""Draw the negative sentence of a training sample: that of a row of another video."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def plain_sentence(text: str) -> str:
    """Return a sentence in lower case, with single spaces and without its period, to compare it with others."""
    return " ".join(text.casefold().split()).rstrip(" .")


class NegativeSentences:
    """
    The rows of other videos from which the negative sentence of each row is drawn.

    Args:
        rows: the rows of a dataset, each with `query`, `vid` and `relevant_windows`.
        must_be_absent: draw no sentence that is annotated as true in the row's own video.

    Raises:
        ValueError: if some row has no negative sentence. The message names the video.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], must_be_absent: bool):
        self._rows = rows
        # With rows sorted by video, those of one video are adjacent, so that choosing a row of another video takes a
        # single draw
        videos, video_of_row = np.unique([row["vid"] for row in rows], return_inverse=True)
        if len(videos) < 2:
            raise ValueError(
                "training needs rows of at least two videos, because negative queries come from another video"
            )
        self._by_video = np.argsort(video_of_row, kind="stable")
        counts = np.bincount(video_of_row)
        self._first = (np.cumsum(counts) - counts)[video_of_row]
        self._count = counts[video_of_row]
        self._true_sentences = _true_sentences(rows) if must_be_absent else {}

    def draw(self, index: int, rng: np.random.Generator) -> Mapping[str, Any]:
        """Draw the row with the negative sentence for the row with this index."""
        true_sentences = self._true_sentences.get(self._rows[index]["vid"], ())
        while True:
            other = self._rows[self._row_of_another_video(index, rng)]
            if not true_sentences or plain_sentence(other["query"]) not in true_sentences:
                return other

    def _row_of_another_video(self, index: int, rng: np.random.Generator) -> int:
        # A position among the rows sorted by video, excluding those of this video. `random` always advances the
        # generator equally; `integers` does not, so the draws that follow would depend on the number of rows.
        place = int(rng.random() * (len(self._rows) - self._count[index]))
        return self._by_video[place + self._count[index] * (place >= self._first[index])]


def _true_sentences(rows: Sequence[Mapping[str, Any]]) -> dict[str, set[str]]:
    """Return the sentences that are true in each video. Raise ValueError if no other one is left for a video."""
    everywhere: Counter[str] = Counter()
    of_video: Counter[tuple[str, str]] = Counter()
    sentences: dict[str, set[str]] = {}
    for row in rows:
        sentence = plain_sentence(row["query"])
        everywhere[sentence] += 1
        of_video[row["vid"], sentence] += 1
        true_sentences = sentences.setdefault(row["vid"], set())
        if row["relevant_windows"]:
            true_sentences.add(sentence)
    for vid, true_sentences in sentences.items():
        others = (text for text, count in everywhere.items() if count > of_video[vid, text])
        if all(text in true_sentences for text in others):
            raise ValueError(
                f"video {vid}: every sentence of another video is also true in it, so there is no negative "
                "sentence to train with `absent_loss_coefficient`"
            )
    return sentences
