"""Simulated rows and features of the size of QVHighlights."""

from collections.abc import Mapping, Sequence

import numpy as np

from modeling_diffusionvmr.data.annotations import SALIENCY_CLIP_SECONDS

QUERIES, DURATION, MAX_WINDOWS = 1550, 150, 4
NUM_CLIPS, NUM_TOKENS, TEXT_SIZE = DURATION // SALIENCY_CLIP_SECONDS, 20, 512


def simulate_truth(seed: int, num_queries: int = QUERIES) -> list[dict]:
    """Draw rows like those of QVHighlights: up to four windows on a grid of clips, with three scores per clip."""
    rng = np.random.default_rng(seed)
    rows = []
    for qid in range(num_queries):
        edges = np.sort(rng.choice(NUM_CLIPS + 1, 2 * rng.integers(1, MAX_WINDOWS + 1), replace=False))
        windows = edges.reshape(-1, 2)
        clips = np.concatenate([np.arange(start, end) for start, end in windows])
        rows.append(
            {
                "qid": qid,
                "query": f"simulated query {qid}",
                "vid": f"simulated_{qid}",
                "duration": DURATION,
                "relevant_windows": (windows * SALIENCY_CLIP_SECONDS).tolist(),
                "relevant_clip_ids": clips.tolist(),
                "saliency_scores": rng.integers(0, 5, (len(clips), 3)).tolist(),
            }
        )
    return rows


class RandomFeatures(Mapping):
    """Arrays cut from one block of random numbers: as large on disk as real features, and fast to make."""

    def __init__(self, identifiers: Sequence, length: int, size: int, seed: int):
        block_length = 4096
        self.block = np.random.default_rng(seed).normal(size=(block_length, size)).astype(np.float16)
        self.starts = {name: index * 37 % (block_length - length) for index, name in enumerate(identifiers)}
        self.length = length

    def __getitem__(self, identifier) -> np.ndarray:
        return self.block[self.starts[identifier] :][: self.length]

    def __iter__(self):
        return iter(self.starts)

    def __len__(self) -> int:
        return len(self.starts)
