"""GloVe word vectors as features of queries."""

import os
import string
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


class GloveFeatures(Mapping):
    """
    Mapping from a qid to the GloVe vectors of its query's words, (words, size) float32.

    Queries are lowercased and split at spaces, as in the loaders of Moment-DETR and UMT. A word that is unknown with
    its punctuation ("bag.") is looked up without it. A word that is still unknown gets a vector of zeros; one warning
    counts these words.

    Args:
        path: text file as released (`glove.6B.300d.txt`): one word and its numbers per line.
        rows: the rows whose queries are looked up.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if a line has another form than the first one. The message names the file and the line.
        KeyError: on access, if a qid is not in `rows`.
    """

    def __init__(self, path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]):
        self.path = path
        queries = {str(row["qid"]): row["query"].lower().split() for row in rows}
        written = {word for words in queries.values() for word in words}
        vectors = self._load(path, written | {word.strip(string.punctuation) for word in written})
        index = {word: number for number, word in enumerate(vectors, start=1)}
        self._vectors = np.stack([np.zeros_like(next(iter(vectors.values()))), *vectors.values()])
        place = {word: index.get(word, index.get(word.strip(string.punctuation), 0)) for word in written}
        self._words = {qid: np.array([place[word] for word in words]) for qid, words in queries.items()}
        unknown = sorted(word for word in written if not place[word])
        if unknown:
            warnings.warn(
                f"{path}: {len(unknown)} of {len(written)} words are unknown and get zeros: "
                f"{', '.join(unknown[:10])}{', ...' if len(unknown) > 10 else ''}",
                stacklevel=3,
            )

    @staticmethod
    def _load(path: str | os.PathLike, words: set[str]) -> dict[str, np.ndarray]:
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such file")
        vectors, size, encoded = {}, None, {word.encode() for word in words}
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if size is not None and line.partition(b" ")[0] not in encoded:
                    continue
                try:
                    # Split from the right, since some words of the largest release contain spaces
                    word, *numbers = line.decode().rstrip().rsplit(" ", -1 if size is None else size)
                    size = size or len(numbers)
                    if word in words:
                        with np.errstate(over="ignore"):  # values that float32 cannot represent become infinity
                            vectors[word] = np.array(numbers, dtype=np.float32)
                        if not size or len(numbers) != size or not np.isfinite(vectors[word]).all():
                            raise ValueError
                except ValueError:
                    raise ValueError(f"{path}, line {number}: must be a word and {size or 'its'} numbers") from None
        if not vectors:
            raise ValueError(f"{path}: contains none of the {len(words)} words")
        return vectors

    def __getitem__(self, identifier: int | str) -> np.ndarray:
        words = self._words.get(str(identifier))
        if words is None:
            raise KeyError(f"{self.path}: qid {identifier} is not in the rows passed when opening it")
        return self._vectors[words]

    def __contains__(self, identifier: object) -> bool:
        return str(identifier) in self._words

    def __iter__(self) -> Iterator[str]:
        return iter(self._words)

    def __len__(self) -> int:
        return len(self._words)
