"""
Annotations -> features in the official layout that behave like those of a frozen CLIP, so that learning can be checked
without downloading any. Whatever is measured on them is to be called simulated.

The world behind them, all of it a function of a seed:

- A word has a fixed random vector. Words with the same first letters ("cleans", "cleaning") are alike. A few directions
  carry much of the variance and many carry little, as in CLIP.
- A sentence is its words' vectors, each blended with the words before it, between a start and an end token. The end
  token sums up the words that carry meaning.
- A moment shows some of these words, not all: a sum of their vectors that comes and goes with soft edges near the
  annotated ones, and whose strength follows its saliency scores, wholly or in part. Some moments show something else
  instead.
- A video also shows distractors: moments of other rows, as they are but for their time. Some share a word with a
  sentence of the video.
- A clip is what it shows, partly as it is and partly through a fixed non-linear mixture, with a background that is the
  video's own, and with noise that lasts for several clips. Backgrounds and noise look like words.
- Sentences and pictures lie in one space, each kind around an offset of its own.

So the cosine similarity of sentence and clip says a little, and a model that learns what the words look like says more.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.annotations import NUM_SALIENCY_ANNOTATORS, SALIENCY_CLIP_SECONDS

CLIP_SIZE = 512  # numbers a clip, and a token, of the CLIP that the official features are from
BACKBONE = "clip"  # the one that shares a space with the sentences

# Words that no picture shows, and that are in every sentence
FUNCTION_WORDS = frozenset(
    "a about after again all also an and another are as at back be been before being both but by can do does doing for"
    " from get gets getting had has have having he her hers herself him himself his how i in inside into is it it's its"
    " itself just like more most not of off on one or other others our out over own person she so some something than"
    " that the their them themselves then there these they thing things this those to too up very was we were what when"
    " where which while who with you your".split()
)
STEM_LETTERS = 5  # words that share them are alike
STEM_SHARE = 0.7  # of a word's variance: what it has in common with its stem
SPECTRUM_POWER = 0.5  # the k-th direction's standard deviation falls as k to the minus this

VIDEO_OFFSET = 1.9  # norm, where a word's is 1
CONTEXT, POSITION, PHRASING = 0.5, 0.3, 0.3  # norms of what else a token holds
DEFAULT_STRENGTH = 0.75  # of a moment without saliency scores: about the mean of those with
SHARED_WORD = 0.5  # the chance that a distractor shares a word on purpose
MIXTURE_GAIN = 1.5  # of the non-linear mixture's input: the higher, the less linear
NOISE_SECONDS = 8.0  # in which the correlation of noise falls to 1 / e


@dataclass(frozen=True)
class NoiseLevel:
    """
    How hard it is to find a moment. Norms are relative to what a moment shows at full strength.

    Args:
        hidden: the chance that a moment does not show a word of its sentence.
        unseen: the chance that a row's moments show none of them, but something that no word stands for.
        mixed: share of what is shown that goes through the non-linear mixture.
        distractors: moments of other rows in each video.
        background: norm of a video's own background.
        lasting, fleeting: norms of noise that lasts for several clips, and of noise that is each clip's own.
        graded: share of a moment's strength that follows its saliency scores; the rest is the same for all its clips.
        edge: seconds in which a moment fades in or out.
        jitter: standard deviation in seconds between a shown and an annotated edge.
        text_offset: norm of what all sentences have in common. The greater, the less their cosine to a clip says.
    """

    hidden: float
    unseen: float
    mixed: float
    distractors: int
    background: float
    lasting: float
    fleeting: float
    graded: float
    edge: float
    jitter: float
    text_offset: float


NOISE_LEVELS = {
    # Set so that on QVHighlights the cosine of sentence and clip alone finds val's highlights with an mAP of about 31
    # and a HIT@1 of about 57 (VeryGood), which a test measures, and so that Moment-DETR learns for 35 epochs about as
    # in its published log on real features. It then gets further (docs/results/README.md)
    "real": NoiseLevel(
        hidden=0.25,
        unseen=0.25,
        mixed=0.5,
        distractors=2,
        background=1.0,
        lasting=0.6,
        fleeting=0.45,
        graded=0.4,
        edge=2.0,
        jitter=2.0,
        text_offset=0.9,
    ),
    "easy": NoiseLevel(
        hidden=0.2,
        unseen=0.0,
        mixed=0.5,
        distractors=2,
        background=1.0,
        lasting=0.5,
        fleeting=0.4,
        graded=1.0,
        edge=1.0,
        jitter=1.0,
        text_offset=1.2,
    ),
}


def words_of(sentence: str) -> list[str]:
    """Its words in lower case; a sentence without letters and digits is one word."""
    return re.findall(r"\w+(?:'\w+)*", sentence.lower()) or [sentence.strip()]


def content_words(sentence: str) -> list[str]:
    """Its words that a picture can show; all of them, where there are function words only."""
    words = words_of(sentence)
    return [word for word in words if word not in FUNCTION_WORDS] or words


def strength_of(row: Mapping[str, Any], times: np.ndarray, noise: NoiseLevel, draw: np.random.Generator) -> np.ndarray:
    """
    How visible a row's moments are, in [0, 1]: 0 everywhere for a row without windows.

    Args:
        row: an annotation.
        times: (clips,) seconds, the middles of clips.
        noise: how soft and how exact edges are.
        draw: of where exactly the edges lie.

    Returns:
        (clips,) strengths.
    """
    strength = np.zeros(len(times))
    for start, end in row.get("relevant_windows") or ():
        start, end = np.array([start, end]) + draw.normal(0, noise.jitter, 2)
        rises, falls = (times - start) / noise.edge, (end - times) / noise.edge
        strength = np.maximum(strength, np.clip(np.minimum(rises, falls) + 0.5, 0, 1))
    if not row.get("saliency_scores"):
        return DEFAULT_STRENGTH * strength
    clips = (np.array(row["relevant_clip_ids"]) + 0.5) * SALIENCY_CLIP_SECONDS
    order = np.argsort(clips)
    most = 4 * NUM_SALIENCY_ANNOTATORS
    scores = np.interp(times, clips[order], np.array(row["saliency_scores"]).sum(1)[order] / most)
    return strength * (noise.graded * scores + (1 - noise.graded) * DEFAULT_STRENGTH)


class SimulatedFeatures:
    """
    Features of the videos and sentences of annotations.

    A word depends on the seed and itself; a sentence also on its `qid`; a video also on its `vid` and on its own rows.
    Which other rows are given, and in which order, matters for one thing only: distractors are drawn from them.

    Args:
        rows: annotations, as from `load_annotations`. A row without windows lends its video nothing, and no distractor.
        seed: of everything.
        noise: a key of `NOISE_LEVELS`, or a level.
        clip_seconds: length of a clip.
        size: numbers a clip and a token.

    Raises:
        ValueError: for a `qid` that two rows have, and for arguments out of range.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        seed: int,
        noise: str | NoiseLevel = "real",
        clip_seconds: float = 2.0,
        size: int = CLIP_SIZE,
    ):
        if isinstance(noise, str) and noise not in NOISE_LEVELS:
            raise ValueError(f"`noise` must be one of {', '.join(NOISE_LEVELS)}, got {noise!r}")
        if not clip_seconds > 0 or not math.isfinite(clip_seconds):
            raise ValueError(f"`clip_seconds` must be a positive number, got {clip_seconds}")
        if size < 1:
            raise ValueError(f"`size` must be at least 1, got {size}")
        self.seed, self.clip_seconds, self.size = seed, clip_seconds, size
        self.noise = NOISE_LEVELS[noise] if isinstance(noise, str) else noise
        self.rows = {}
        for row in rows:
            if self.rows.setdefault(str(row["qid"]), row) is not row:
                raise ValueError(f"`qid` {row['qid']!r} is used twice")
        self.rows = dict(sorted(self.rows.items()))  # so that their order in the files does not matter
        self.rows_of_video: dict[str, list[Mapping]] = {}
        self._lenders: list[Mapping] = []
        self._lenders_of_word: dict[str, list[Mapping]] = {}
        for row in self.rows.values():
            self.rows_of_video.setdefault(row["vid"], []).append(row)
            if row.get("relevant_windows"):
                self._lenders.append(row)
                for word in dict.fromkeys(content_words(row["query"])):
                    self._lenders_of_word.setdefault(word, []).append(row)
        self._space = _Space(seed, size)
        self._spaces = {BACKBONE: self._space}

    def text(self, qid: int | str) -> np.ndarray:
        """Features of a sentence: (words + 2, size) float16, the first and last token being its start and its end."""
        sentence, draw = self.rows[str(qid)]["query"], _generator(self.seed, "text", qid)
        tokens = np.stack([self._space.word(word) for word in words_of(sentence)])
        before = np.cumsum(tokens, axis=0) - tokens
        before /= np.maximum(np.linalg.norm(before, axis=1, keepdims=True), 1)
        tokens += CONTEXT * before + PHRASING * self._space.vectors(draw, len(tokens))
        summary = _unit(sum(self._space.word(word) for word in content_words(sentence)))
        tokens = np.concatenate([self._space.fixed("start token")[None], tokens, summary[None]])
        positions = np.stack([self._space.fixed(f"position {i}") for i in range(len(tokens))])
        return (tokens + POSITION * positions + self.noise.text_offset * self._space.fixed("text")).astype(np.float16)

    def video(self, vid: str, backbone: str = BACKBONE, size: int | None = None) -> np.ndarray:
        """
        Features of a video.

        Args:
            vid: its id.
            backbone: any other name than "clip" is a backbone with a space, a background and noise of its own.
            size: numbers a clip of such a backbone, by default those of CLIP.

        Returns:
            (clips, size) float16. The last clip may reach beyond the video's end.
        """
        duration = max(row["duration"] for row in self.rows_of_video[vid])
        times = (np.arange(math.ceil(duration / self.clip_seconds)) + 0.5) * self.clip_seconds
        shown = self._shown(vid, times)
        if backbone not in self._spaces:
            self._spaces[backbone] = _Space(self.seed, self.size, backbone)
        space = self._spaces[backbone]
        draw = _generator(self.seed, backbone, vid)
        mixed = self.noise.mixed
        clips = math.sqrt(1 - mixed) * shown + math.sqrt(mixed) * space.mixture(shown)
        clips += VIDEO_OFFSET * space.fixed("video") + self.noise.background * space.vectors(draw, 1)
        lasting, memory = space.vectors(draw, len(times)), math.exp(-self.clip_seconds / NOISE_SECONDS)
        for i in range(1, len(lasting)):
            lasting[i] = memory * lasting[i - 1] + math.sqrt(1 - memory**2) * lasting[i]
        clips += self.noise.lasting * lasting + self.noise.fleeting * space.vectors(draw, len(times))
        return (clips if backbone == BACKBONE else space.projected(clips, size or self.size)).astype(np.float16)

    def distractors(self, vid: str) -> list[Mapping[str, Any]]:
        """The rows of other videos whose moments the video shows, too."""
        own = [set(content_words(row["query"])) for row in self.rows_of_video[vid]]
        words, draw, found = sorted(set().union(*own)), _generator(self.seed, "distractors", vid), []
        for _ in range(self.noise.distractors):
            word = words[draw.integers(len(words))]
            pool = self._lenders_of_word.get(word, []) if draw.random() < SHARED_WORD else []
            share = draw.random()
            row = _chosen(pool, share, vid, own) or _chosen(self._lenders, share, vid, own)
            if row is not None:
                found.append(row)
        return found

    def _shown(self, vid: str, times: np.ndarray) -> np.ndarray:
        """(clips, size): the sum of what all moments of a video show."""
        shown, length = np.zeros((len(times), self.size)), len(times) * self.clip_seconds
        free = np.ones(len(times))  # where the video's own moments are, distractors give way
        for row in self.rows_of_video[vid]:
            draw = _generator(self.seed, "moment", vid, row["qid"])
            strength = strength_of(row, times, self.noise, draw)
            shown += strength[:, None] * self._picture(row, draw)
            free *= 1 - strength
        for i, row in enumerate(self.distractors(vid)):
            draw = _generator(self.seed, "distractor", vid, i)
            # Its moments keep the share of the video that they last, and begin anywhere
            elsewhere = (times / length + draw.random()) % 1 * row["duration"]
            strength = free * strength_of(row, elsewhere, self.noise, draw)
            shown += strength[:, None] * self._picture(row, draw)
        return shown

    def _picture(self, row: Mapping[str, Any], draw: np.random.Generator) -> np.ndarray:
        """(size,) what a row's moments show, of norm 1: one of its words at least, or what no word stands for."""
        words = content_words(row["query"])
        seen = draw.random(len(words)) >= self.noise.hidden
        seen[draw.integers(len(words))] = True
        if draw.random() < self.noise.unseen:
            return _unit(self._space.vectors(draw, 1)[0])
        return _unit(sum(self._space.word(word) for word, is_seen in zip(words, seen) if is_seen))


class _Space:
    """Where the vectors of one backbone lie: vectors that are drawn in it have a norm of about 1."""

    def __init__(self, seed: int, size: int, name: str = BACKBONE):
        self.seed, self.size, self.name = seed, size, name
        spectrum = np.arange(1, size + 1) ** -SPECTRUM_POWER
        rotation, _ = np.linalg.qr(_generator(seed, name, "rotation").standard_normal((size, size)))
        self._axes = _unit(spectrum)[:, None] * rotation
        draw = _generator(seed, name, "mixture")
        self._mix_in, self._mix_bias = MIXTURE_GAIN * draw.standard_normal((size, size)), draw.standard_normal(size)
        self._mix_out = self.vectors(draw, size) / math.sqrt(size)
        self._known: dict[str, np.ndarray] = {}
        self._projection: np.ndarray | None = None

    def vectors(self, draw: np.random.Generator, count: int) -> np.ndarray:
        """(count, size) random vectors."""
        return draw.standard_normal((count, self.size)) @ self._axes

    def fixed(self, name: str) -> np.ndarray:
        """(size,) the vector of a name, of norm 1."""
        if name not in self._known:
            self._known[name] = _unit(self.vectors(_generator(self.seed, self.name, "fixed", name), 1)[0])
        return self._known[name]

    def word(self, word: str) -> np.ndarray:
        """(size,) a word's vector, of norm 1."""
        stem, own = self.fixed(f"stem {word[:STEM_LETTERS]}"), self.fixed(f"word {word}")
        return _unit(math.sqrt(STEM_SHARE) * stem + math.sqrt(1 - STEM_SHARE) * own)

    def mixture(self, shown: np.ndarray) -> np.ndarray:
        """(clips, size) -> (clips, size): a fixed random layer with its bias, so that nothing shown gives nothing."""
        hidden = np.tanh(shown @ self._mix_in + self._mix_bias) - np.tanh(self._mix_bias)
        return hidden @ self._mix_out

    def projected(self, clips: np.ndarray, size: int) -> np.ndarray:
        """(clips, self.size) -> (clips, size): the same in a space of another size."""
        if self._projection is None or self._projection.shape[1] != size:
            draw = _generator(self.seed, self.name, "projection")
            self._projection = draw.standard_normal((self.size, size)) / math.sqrt(size)
        return clips @ self._projection


def _chosen(rows: Sequence[Mapping], share: float, vid: str, own: Sequence[set]) -> Mapping | None:
    """The row at `share` of the way through, or the next after it, of another video and that shows no own sentence."""
    first = int(share * len(rows))
    for i in range(len(rows)):
        row = rows[(first + i) % len(rows)]
        if row["vid"] != vid and not any(words <= set(content_words(row["query"])) for words in own):
            return row
    return None


def _generator(*key: Any) -> np.random.Generator:
    """Random numbers of a key; of another key, others."""
    digest = hashlib.blake2b(repr([str(part) for part in key]).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)
