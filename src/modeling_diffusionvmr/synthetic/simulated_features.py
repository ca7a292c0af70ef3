"""
Features made from annotations alone. They behave like those of a frozen CLIP, so that training can be tested without
downloading features. Results on them must be reported as simulated.

Everything is a function of a seed:

- A word has a fixed random vector. Words with the same first letters ("cleans", "cleaning") have similar vectors. As in
  CLIP, a few directions carry most of the variance.
- A sentence is a sequence of its words' vectors, each blended with the words before it, between a start and an end
  token. The end token is the sum of the words that carry meaning.
- A moment shows some of these words: the sum of their vectors, with soft edges near the annotated ones and a strength
  that depends, at least in part, on the saliency scores. Some moments show none of the words but something else.
- A video also shows distractors: moments of other rows at other times. Some share a word with one of its sentences.
- A clip is what it shows, partly unchanged and partly after a fixed nonlinear mixture, plus a background per video and
  noise, some of which lasts for several clips. Background and noise look like words.
- Sentences and clips share one space, but each has its own offset.

The cosine similarity of sentence and clip is therefore a weak cue. A model that learns what the words look like does
better.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checks import check_positive
from ..data.annotations import MAX_SALIENCY, NUM_SALIENCY_ANNOTATORS, SALIENCY_CLIP_SECONDS

CLIP_SIZE = 512  # size of a clip's and a token's vector in the official CLIP features
BACKBONE = "clip"  # the backbone that shares a space with the sentences

# Frequent words that no picture can show
FUNCTION_WORDS = frozenset(
    "a about after again all also an and another are as at back be been before being both but by can do does doing for"
    " from get gets getting had has have having he her hers herself him himself his how i in inside into is it it's its"
    " itself just like more most not of off on one or other others our out over own person she so some something than"
    " that the their them themselves then there these they thing things this those to too up very was we were what when"
    " where which while who with you your".split()
)
STEM_LETTERS = 5  # words with the same first letters have similar vectors
STEM_SHARE = 0.7  # share of a word's variance that comes from its stem
SPECTRUM_POWER = 0.5  # the standard deviation along direction k is proportional to k to the power of minus this

VIDEO_OFFSET = 1.9  # norm, relative to that of a word
CONTEXT, POSITION, PHRASING = 0.5, 0.3, 0.3  # norms of the other parts of a token
DEFAULT_STRENGTH = 0.75  # strength of a moment without saliency scores: about the mean of moments with scores
SHARED_WORD = 0.5  # probability that a distractor is chosen to share a word with a sentence
MIXTURE_GAIN = 1.5  # gain of the nonlinear mixture's input: the higher, the less linear
NOISE_SECONDS = 8.0  # time in which the correlation of lasting noise falls to 1 / e


@dataclass(frozen=True)
class NoiseLevel:
    """
    How hard it is to find a moment. Norms are relative to what a moment shows at full strength.

    Args:
        hidden: probability that a moment does not show a given word of its sentence.
        unseen: probability that a row's moments show none of its words, but something that no word describes.
        mixed: share of the shown content that goes through the nonlinear mixture.
        distractors: number of moments of other rows in each video.
        background: norm of a video's background.
        lasting: norm of noise that lasts for several clips.
        fleeting: norm of noise that is independent between clips.
        graded: share of a moment's strength that follows its saliency scores. The rest is the same for all its clips.
        edge: seconds that a moment takes to fade in or out.
        jitter: standard deviation, in seconds, of a shown edge around the annotated one.
        text_offset: norm of the vector that all sentences share. The larger, the weaker the cosine cue.
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
    # Calibrated on QVHighlights in two ways. Ranking the clips of val by cosine similarity alone gives a highlight mAP
    # of about 31 and a HIT@1 of about 57 (VeryGood), which a test checks. For 35 epochs, Moment-DETR learns about as
    # fast as in its published log on real features; after that it reaches better results (docs/results/README.md)
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
    """Return the words of a sentence in lower case. A sentence without letters and digits is one word."""
    return re.findall(r"\w+(?:'\w+)*", sentence.lower()) or [sentence.strip()]


def content_words(sentence: str) -> list[str]:
    """Return the words of a sentence that a picture can show; all words if there are only function words."""
    words = words_of(sentence)
    return [word for word in words if word not in FUNCTION_WORDS] or words


def strength_of(row: Mapping[str, Any], times: np.ndarray, noise: NoiseLevel, rng: np.random.Generator) -> np.ndarray:
    """
    Return how visible a row's moments are in each clip. For a row without windows, this is 0 everywhere.

    Args:
        row: an annotation.
        times: (clips,) seconds of the clips' centers.
        noise: determines the edges and the influence of saliency scores.
        rng: draws the jitter of the edges.

    Returns:
        (clips,) strengths in [0, 1].
    """
    strength = np.zeros(len(times))
    for start, end in row.get("relevant_windows") or ():
        start, end = np.array([start, end]) + rng.normal(0, noise.jitter, 2)
        rises, falls = (times - start) / noise.edge, (end - times) / noise.edge
        strength = np.maximum(strength, np.clip(np.minimum(rises, falls) + 0.5, 0, 1))
    if not row.get("saliency_scores"):
        return DEFAULT_STRENGTH * strength
    clips = (np.array(row["relevant_clip_ids"]) + 0.5) * SALIENCY_CLIP_SECONDS
    order = np.argsort(clips)
    shares = np.array(row["saliency_scores"]).sum(1) / (MAX_SALIENCY * NUM_SALIENCY_ANNOTATORS)
    scores = np.interp(times, clips[order], shares[order])
    return strength * (noise.graded * scores + (1 - noise.graded) * DEFAULT_STRENGTH)


class SimulatedFeatures:
    """
    Simulated features of the videos and sentences of annotations.

    A word's vector depends on the seed and the word only; a sentence's features also on its `qid`; a video's also on
    its `vid` and its rows. Other rows matter only as a source of distractors, and the order of rows does not matter.

    Args:
        rows: annotations, as from `load_annotations`. A row without windows adds nothing to its video and is never a
            distractor.
        seed: seed of all random draws.
        noise: a key of `NOISE_LEVELS`, or a `NoiseLevel`.
        clip_seconds: length of a clip.
        size: size of a clip's and a token's vector.

    Raises:
        ValueError: if two rows have the same `qid`, or if an argument is out of range.
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
        check_positive(clip_seconds, "`clip_seconds`")
        if size < 1:
            raise ValueError(f"`size` must be at least 1, got {size}")
        self.seed, self.clip_seconds, self.size = seed, clip_seconds, size
        self.noise = NOISE_LEVELS[noise] if isinstance(noise, str) else noise
        by_qid: dict[str, Mapping[str, Any]] = {}
        for row in rows:
            if by_qid.setdefault(str(row["qid"]), row) is not row:
                raise ValueError(f"`qid` {row['qid']!r} is used twice")
        self.rows = dict(sorted(by_qid.items()))  # makes the order of the files irrelevant
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
        """Return the features of a sentence: float16 (words + 2, size), with a start and an end token."""
        sentence, rng = self.rows[str(qid)]["query"], _generator(self.seed, "text", qid)
        tokens = np.stack([self._space.word(word) for word in words_of(sentence)])
        before = np.cumsum(tokens, axis=0) - tokens
        before /= np.maximum(np.linalg.norm(before, axis=1, keepdims=True), 1)
        tokens += CONTEXT * before + PHRASING * self._space.vectors(rng, len(tokens))
        summary = _unit(self._space.sum_of(content_words(sentence)))
        tokens = np.concatenate([self._space.fixed("start token")[None], tokens, summary[None]])
        positions = np.stack([self._space.fixed(f"position {i}") for i in range(len(tokens))])
        return (tokens + POSITION * positions + self.noise.text_offset * self._space.fixed("text")).astype(np.float16)

    def video(self, vid: str, backbone: str = BACKBONE, size: int | None = None) -> np.ndarray:
        """
        Return the features of a video.

        Args:
            vid: the video's id.
            backbone: a name. Every name other than "clip" stands for a backbone with its own space, backgrounds and
                noise, which has nothing in common with the sentences.
            size: size of a clip's vector in such a backbone. Default: that of "clip".

        Returns:
            Float16 (clips, size). The last clip may extend beyond the video's end.
        """
        duration = max(row["duration"] for row in self.rows_of_video[vid])
        times = (np.arange(math.ceil(duration / self.clip_seconds)) + 0.5) * self.clip_seconds
        shown = self._shown(vid, times)
        if backbone not in self._spaces:
            self._spaces[backbone] = _Space(self.seed, self.size, backbone)
        space = self._spaces[backbone]
        rng = _generator(self.seed, backbone, vid)
        mixed = self.noise.mixed
        clips = math.sqrt(1 - mixed) * shown + math.sqrt(mixed) * space.mixture(shown)
        clips += VIDEO_OFFSET * space.fixed("video") + self.noise.background * space.vectors(rng, 1)
        lasting, memory = space.vectors(rng, len(times)), math.exp(-self.clip_seconds / NOISE_SECONDS)
        for i in range(1, len(lasting)):
            lasting[i] = memory * lasting[i - 1] + math.sqrt(1 - memory**2) * lasting[i]
        clips += self.noise.lasting * lasting + self.noise.fleeting * space.vectors(rng, len(times))
        return (clips if backbone == BACKBONE else space.projected(clips, size or self.size)).astype(np.float16)

    def distractors(self, vid: str) -> list[Mapping[str, Any]]:
        """Return the rows of other videos whose moments this video shows as distractors."""
        own = [set(content_words(row["query"])) for row in self.rows_of_video[vid]]
        words, rng, found = sorted(set().union(*own)), _generator(self.seed, "distractors", vid), []
        for _ in range(self.noise.distractors):
            word = words[rng.integers(len(words))]
            pool = self._lenders_of_word.get(word, []) if rng.random() < SHARED_WORD else []
            share = rng.random()
            row = _chosen(pool, share, vid, own) or _chosen(self._lenders, share, vid, own)
            if row is not None:
                found.append(row)
        return found

    def _shown(self, vid: str, times: np.ndarray) -> np.ndarray:
        """Return the sum of what all moments of a video show, including distractors: (clips, size)."""
        shown, length = np.zeros((len(times), self.size)), len(times) * self.clip_seconds
        free = np.ones(len(times))  # the strength left for distractors: none during the video's own moments
        for row in self.rows_of_video[vid]:
            rng = _generator(self.seed, "moment", vid, row["qid"])
            strength = strength_of(row, times, self.noise, rng)
            shown += strength[:, None] * self._picture(row, rng)
            free *= 1 - strength
        for i, row in enumerate(self.distractors(vid)):
            rng = _generator(self.seed, "distractor", vid, i)
            # Its moments last the same share of the video, and start at a random time
            elsewhere = (times / length + rng.random()) % 1 * row["duration"]
            strength = free * strength_of(row, elsewhere, self.noise, rng)
            shown += strength[:, None] * self._picture(row, rng)
        return shown

    def _picture(self, row: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
        """Draw what a row's moments show, (size,) with norm 1: some of its words, or something without a word."""
        words = content_words(row["query"])
        seen = rng.random(len(words)) >= self.noise.hidden
        seen[rng.integers(len(words))] = True
        if rng.random() < self.noise.unseen:
            return _unit(self._space.vectors(rng, 1)[0])
        return _unit(self._space.sum_of(word for word, is_seen in zip(words, seen) if is_seen))


class _Space:
    """The vector space of one backbone."""

    def __init__(self, seed: int, size: int, name: str = BACKBONE):
        self.seed, self.size, self.name = seed, size, name
        spectrum = np.arange(1, size + 1) ** -SPECTRUM_POWER
        rotation, _ = np.linalg.qr(_generator(seed, name, "rotation").standard_normal((size, size)))
        self._axes = _unit(spectrum)[:, None] * rotation
        rng = _generator(seed, name, "mixture")
        self._mix_in, self._mix_bias = MIXTURE_GAIN * rng.standard_normal((size, size)), rng.standard_normal(size)
        self._mix_out = self.vectors(rng, size) / math.sqrt(size)
        self._known: dict[str, np.ndarray] = {}
        self._projection: np.ndarray | None = None

    def vectors(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draw random vectors with a norm of about 1: (count, size)."""
        return rng.standard_normal((count, self.size)) @ self._axes

    def fixed(self, name: str) -> np.ndarray:
        """Return the fixed vector of a name: (size,) with norm 1."""
        if name not in self._known:
            self._known[name] = _unit(self.vectors(_generator(self.seed, self.name, "fixed", name), 1)[0])
        return self._known[name]

    def word(self, word: str) -> np.ndarray:
        """Return the vector of a word: (size,) with norm 1."""
        stem, own = self.fixed(f"stem {word[:STEM_LETTERS]}"), self.fixed(f"word {word}")
        return _unit(math.sqrt(STEM_SHARE) * stem + math.sqrt(1 - STEM_SHARE) * own)

    def sum_of(self, words: Iterable[str]) -> np.ndarray:
        """Return the sum of the vectors of words, (size,)."""
        return sum((self.word(word) for word in words), start=np.zeros(self.size))

    def mixture(self, shown: np.ndarray) -> np.ndarray:
        """Apply a fixed random nonlinear layer, which maps zeros to zeros: (clips, size) -> (clips, size)."""
        hidden = np.tanh(shown @ self._mix_in + self._mix_bias) - np.tanh(self._mix_bias)
        return hidden @ self._mix_out

    def projected(self, clips: np.ndarray, size: int) -> np.ndarray:
        """Project vectors to another size: (clips, self.size) -> (clips, size)."""
        if self._projection is None or self._projection.shape[1] != size:
            rng = _generator(self.seed, self.name, "projection")
            self._projection = rng.standard_normal((self.size, size)) / math.sqrt(size)
        return clips @ self._projection


def _chosen(rows: Sequence[Mapping], share: float, vid: str, own: Sequence[set]) -> Mapping | None:
    """
    Return the first row, starting at `share` in [0, 1) of the list, that is of another video than `vid` and does not
    contain all content words of one of its sentences, given as sets in `own`. `None` if there is no such row.
    """
    first = int(share * len(rows))
    for i in range(len(rows)):
        row = rows[(first + i) % len(rows)]
        if row["vid"] != vid and not any(words <= set(content_words(row["query"])) for words in own):
            return row
    return None


def _generator(*key: Any) -> np.random.Generator:
    """Return a random number generator that is seeded by a key."""
    digest = hashlib.blake2b(repr([str(part) for part in key]).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)
