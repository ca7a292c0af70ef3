"""Rows and features -> samples, with the random draws of training; samples -> batches."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..configuration_diffusionvmr import DiffusionVMRConfig
from ..data.annotations import SALIENCY_CLIP_SECONDS, check_row, warn_dropped
from ..data.features import common_clip_seconds, name_of
from ..diffusion import DiffusionSchedule, Draws
from ..processing_diffusionvmr import DiffusionVMRProcessor
from ..spans import relevant_clips, window_to_span

NUM_SALIENCY_PAIRS = 2  # a sample's, as in Moment-DETR: a hard and an easy one
DRAWN_ROWS = 256  # that share a stream of random numbers, which no other row has a part in
MAX_AVERAGED_VIDEOS = 256  # that are kept in memory, 1.2 MB each with VGG's or C3D's features


class MomentRetrievalDataset(Dataset):
    """
    One sample a row (a query on its video), as tensors.

    All that is random in a training sample comes from (seed, epoch, row), so that it does not depend on how rows are
    shuffled, batched or spread over workers.

    Args:
        rows: from `load_annotations`, or any sequence of dicts with `qid, query, vid, duration, relevant_windows`.
        video_features: a mapping from `vid` to an array (clips, size), or a sequence of them, one a backbone.
        text_features: a mapping from `qid` to an array (tokens, size).
        processor: the door into the model.
        config: of the model that is trained; its samples carry draws. `None` for inference.
        clip_seconds: length of a clip; by default what the features say of themselves, and where they say nothing they
            cover the whole `duration`.
        seed: of the draws.
        skip_invalid: read all features once, and drop the rows whose features cannot be used, with one warning that
            says how many and which.

    Raises:
        ValueError: for a row that `check_row` refuses, with windows that reach beyond its video, or without features;
            and when a sample is asked for whose features the processor refuses. It names the qid or vid.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        video_features: Mapping | Sequence[Mapping],
        text_features: Mapping,
        processor: DiffusionVMRProcessor,
        config: DiffusionVMRConfig | None = None,
        clip_seconds: float | None = None,
        seed: int = 0,
        skip_invalid: bool = False,
    ):
        self.video_features = [video_features] if isinstance(video_features, Mapping) else list(video_features)
        self.text_features = text_features
        self.processor = processor
        self.config = config
        self.clip_seconds = common_clip_seconds(self.video_features) if clip_seconds is None else clip_seconds
        if self.clip_seconds is not None and not 0 < self.clip_seconds < math.inf:
            raise ValueError(f"`clip_seconds` must be a number of seconds above 0, got {self.clip_seconds}")
        self.seed = seed
        self._averaged: dict[str, tuple[Tensor, int]] = {}
        self.rows = [self._checked(row) for row in rows]
        if skip_invalid:
            self.rows, dropped = self._readable()
            if dropped:
                warn_dropped("features", dropped, len(self.rows))
        else:
            for row in self.rows:
                self._check_present(row)
        self._truth = _Truth(self.rows)
        self._has_warned = False
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers that live on see it change
        if config is not None:
            for row in self.rows:
                if "relevant_windows" not in row:
                    raise ValueError(f"qid {row['qid']}: training needs its `relevant_windows`")
            self.schedule = DiffusionSchedule(config.num_diffusion_steps, config.signal_scale)
            self._draws_of: tuple[int, _EpochDraws] | None = None
            self._group_by_video()

    @staticmethod
    def _checked(row: Mapping[str, Any]) -> dict[str, Any]:
        try:
            checked = check_row(row)
        except ValueError as error:
            raise ValueError(f"qid {row.get('qid')}: {error}") from None
        for window, inside in zip(row.get("relevant_windows") or [], checked.get("relevant_windows", [])):
            if list(window) != inside:
                raise ValueError(f"qid {row['qid']}: {window} ends after the video, at {row['duration']} s")
        return checked

    def _check_present(self, row: Mapping[str, Any]):
        for store in self.video_features:
            if row["vid"] not in store:
                raise ValueError(f"qid {row['qid']}: no features of video {row['vid']} in {name_of(store)}")
        if row["qid"] not in self.text_features:
            raise ValueError(f"qid {row['qid']}: no features of its sentence in {name_of(self.text_features)}")

    def _readable(self) -> tuple[list[dict[str, Any]], list[str]]:
        videos: dict[str, ValueError | None] = {}  # each is read once
        kept, dropped = [], []
        for row in tqdm(self.rows, desc="reading all features"):
            try:
                self._check_present(row)
                if row["vid"] not in videos:
                    videos[row["vid"]] = None
                    try:
                        self._video(row)
                    except ValueError as error:
                        videos[row["vid"]] = error
                if videos[row["vid"]] is not None:
                    raise videos[row["vid"]]
                self._text(row)
            except ValueError as error:
                message = str(error)
                dropped.append(message if message.startswith(f"qid {row['qid']}:") else f"qid {row['qid']}: {message}")
            else:
                kept.append(row)
        if not kept:
            raise ValueError(f"there are usable features for none of {len(self.rows)} rows; {dropped[0]}")
        return kept, dropped

    def _group_by_video(self):
        # Rows of one video side by side, so that a row of another one is a single draw
        videos, video_of_row = np.unique([row["vid"] for row in self.rows], return_inverse=True)
        if len(videos) < 2:
            raise ValueError("training needs rows of at least two videos, since negative queries come from another one")
        self._by_video = np.argsort(video_of_row, kind="stable")
        counts = np.bincount(video_of_row)
        self._first = (np.cumsum(counts) - counts)[video_of_row]
        self._count = counts[video_of_row]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def epoch(self) -> int:
        """The epoch whose draws samples carry."""
        return int(self._epoch)

    def set_epoch(self, epoch: int):
        """Sets the epoch; `Trainer` calls it."""
        self._epoch.fill_(epoch)

    def covered_duration(self, row: Mapping[str, Any], num_clips: int) -> float:
        """Seconds that the features of a row's video cover."""
        return row["duration"] if self.clip_seconds is None else num_clips * self.clip_seconds

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The samples of a batch. A `DataLoader` asks for them so: what is computed is computed for all at once."""
        samples = []
        indices = [range(len(self))[index] for index in indices]  # -1 is the last one
        for index in indices:
            row = self.rows[index]
            video, covered = self._video(row)
            samples.append(
                {"row": index, "covered_duration": covered, "video_features": video, "text_features": self._text(row)}
            )
        rows = torch.tensor(indices)
        spans, counts = self._truth.spans(rows, torch.tensor([sample["covered_duration"] for sample in samples]))
        self._warn_of_lost_windows(rows, counts, samples)
        for sample, sample_spans, count in zip(samples, spans, counts.tolist()):
            if "relevant_windows" in self.rows[sample["row"]]:
                sample["labels"] = {"spans": sample_spans[:count]}
        if self.config is not None:
            self._draw(samples, rows, spans, counts)
        return samples

    def _warn_of_lost_windows(self, rows: Tensor, counts: Tensor, samples: Sequence[dict[str, Any]]):
        lost = counts < self._truth.windows[rows, :, 0].isfinite().sum(1)
        if lost.any() and not self._has_warned:
            self._has_warned = True
            sample = samples[int(lost.byte().argmax())]
            qid, covered = self.rows[sample["row"]]["qid"], sample["covered_duration"]
            warnings.warn(
                f"qid {qid}: a window lies wholly beyond the {covered:g} s that the features of its video cover, and "
                "is left out; others are not named. Is the length of a clip right?",
                stacklevel=4,
            )

    def _video(self, row: Mapping[str, Any]) -> tuple[Tensor, float]:
        """The features (Lv, Dv) of a row's video, and the seconds that they cover."""
        vid = row["vid"]
        if vid in self._averaged:
            features, length = self._averaged[vid]
        else:
            arrays = [store[vid] for store in self.video_features]
            features, length = self.processor.prepare_video(arrays, f"video {vid}"), min(map(len, arrays))
            # A long video is small now, was slow to read, and has many queries (TACoS: 130)
            if length > len(features) and len(self._averaged) < MAX_AVERAGED_VIDEOS:
                self._averaged[vid] = features, length
        return features, self.covered_duration(row, length)

    def _text(self, row: Mapping[str, Any]) -> Tensor:
        return self.processor.prepare_text(self.text_features[row["qid"]], f"qid {row['qid']}")

    def _draw(self, samples: Sequence[dict[str, Any]], rows: Tensor, spans: Tensor, counts: Tensor):
        """Adds what is random in training to B samples; rows (B,), spans (B, M, 2) and counts (B,) are theirs."""
        draws = self._epoch_draws()
        noisy_spans, timesteps = self.schedule.corrupt(spans, counts, draws.corruption.of(rows))

        num_clips = torch.tensor([sample["video_features"].shape[0] for sample in samples])
        covered = torch.tensor([sample["covered_duration"] for sample in samples])
        scores = self._truth.clip_scores(rows, spans, counts, covered, num_clips)
        pairs, num_pairs = _saliency_pairs(scores, num_clips, draws.saliency[rows])

        others = (draws.negative[rows].double().numpy() * (len(self.rows) - self._count[rows])).astype(int)
        others += self._count[rows] * (others >= self._first[rows])
        for index, sample in enumerate(samples):
            sample["noisy_spans"], sample["timesteps"] = noisy_spans[index], timesteps[index]
            sample["labels"]["saliency_pos"] = pairs[0, index, : num_pairs[index]]
            sample["labels"]["saliency_neg"] = pairs[1, index, : num_pairs[index]]
            sample["negative_text_features"] = self._text(self.rows[self._by_video[others[index]]])

    def _epoch_draws(self) -> "_EpochDraws":
        """The random numbers of all rows in this epoch: a few MB, and some calls instead of some a sample."""
        epoch = self.epoch
        if self._draws_of is None or self._draws_of[0] != epoch:
            most = self._truth.windows.shape[1]
            blocks = [self._block_draws(epoch, block, most) for block in range(math.ceil(len(self) / DRAWN_ROWS))]
            self._draws_of = (
                epoch,
                _EpochDraws(
                    Draws(*(torch.cat(parts) for parts in zip(*(block.corruption.tensors() for block in blocks)))),
                    torch.cat([block.saliency for block in blocks]),
                    torch.cat([block.negative for block in blocks]),
                ),
            )
        return self._draws_of[1]

    def _block_draws(self, epoch: int, block: int, most: int) -> "_EpochDraws":
        random = torch.Generator()
        random.manual_seed(int(np.random.SeedSequence((self.seed, epoch, block)).generate_state(1)[0]))
        return _EpochDraws(
            saliency=torch.rand(DRAWN_ROWS, 2, NUM_SALIENCY_PAIRS, generator=random),
            negative=torch.rand(DRAWN_ROWS, generator=random),
            corruption=self.schedule.draw(DRAWN_ROWS, most, self.config.max_training_proposals, random),
        )


@dataclass(frozen=True)
class _EpochDraws:
    """Of R rows: for `corrupt`; for the pairs of clips, (R, 2, P); for the query of another video, (R,); in [0, 1)."""

    corruption: Draws
    saliency: Tensor
    negative: Tensor


class _Truth:
    """
    The annotations of R rows as tensors: true windows in seconds (R, M, 2), padded with NaN, and what annotators gave
    each of their clips, the sum of all and 1 (R, A); 0 for clips that they gave nothing.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        windows = [row.get("relevant_windows") or [] for row in rows]
        table = np.full((len(rows), max(map(len, windows), default=0), 2), np.nan, dtype=np.float32)
        for row, row_windows in zip(table, windows):
            row[: len(row_windows)] = np.reshape(row_windows, (-1, 2))
        self.windows = torch.from_numpy(table)

        scored = {index: row for index, row in enumerate(rows) if row.get("saliency_scores")}
        most = max((max(row["relevant_clip_ids"]) + 1 for row in scored.values()), default=1)
        table = np.zeros((len(rows), most), dtype=np.float32)
        for index, row in scored.items():
            table[index, row["relevant_clip_ids"]] = np.sum(row["saliency_scores"], axis=1) + 1
        self.scores = torch.from_numpy(table)

    def spans(self, rows: Tensor, covered: Tensor) -> tuple[Tensor, Tensor]:
        """
        The true spans (B, M, 2) of some rows, the real ones first, and their counts (B,), where features cover so many
        seconds (B,). Of a window that reaches beyond them it is the part that they cover; of one wholly beyond, none.
        """
        windows = self.windows[rows] / covered[:, None, None]
        inside = windows[..., 0] < 1  # false of NaN
        order = (~inside).byte().argsort(dim=1, stable=True)[..., None].expand(-1, -1, 2)
        return window_to_span(windows.clamp(max=1).nan_to_num()).gather(1, order), inside.sum(1)

    def clip_scores(self, rows: Tensor, spans: Tensor, counts: Tensor, covered: Tensor, num_clips: Tensor) -> Tensor:
        """
        How salient each clip is (B, L): above 0 where it is relevant, and more where annotators gave more. Spans and
        counts are those of `spans`; without annotators' scores all relevant clips have the same.
        """
        longest = int(num_clips.max())
        relevant = relevant_clips(spans, torch.arange(spans.shape[1]) < counts[:, None], num_clips, longest).float()
        # A clip has the scores of those annotators' clips whose centre it holds, and of the one that holds its centre
        centers = (torch.arange(self.scores.shape[1]) + 0.5) * SALIENCY_CLIP_SECONDS
        scores = self.scores[rows] * (centers < covered[:, None])
        held = torch.minimum((centers / covered[:, None] * num_clips[:, None]).long(), num_clips[:, None] - 1)
        centers = (torch.arange(longest) + 0.5) * (covered / num_clips)[:, None]
        holders = (centers / SALIENCY_CLIP_SECONDS).long().clamp(max=scores.shape[1])
        annotated = nn.functional.pad(scores, (0, 1)).gather(1, holders).scatter_reduce(1, held, scores, "amax")
        annotated = annotated * (torch.arange(longest) < num_clips[:, None])
        return torch.where(scores.any(1, keepdim=True), annotated, relevant)


def _saliency_pairs(scores: Tensor, num_clips: Tensor, uniform: Tensor) -> tuple[Tensor, list[int]]:
    """
    Clips that are more salient, and clips that are less: (2, B, P), and how many pairs of each sample are to be used.

    As in Moment-DETR one pair is hard, the best against the worst of the relevant clips by the annotators' scores, and
    one easy, a relevant clip against one that is not. Where a video gives one kind only, both are of that kind.

    Args:
        scores: (B, L), from `_Truth.clip_scores`.
        num_clips: (B,), the real clips.
        uniform: (B, 2, P) in [0, 1).
    """
    relevant = scores > 0
    other = ~relevant & (torch.arange(scores.shape[1]) < num_clips[:, None])
    best = relevant & (scores == scores.amax(1, keepdim=True))
    worst = relevant & (scores == scores.masked_fill(~relevant, math.inf).amin(1, keepdim=True)) & ~best
    hard, easy = torch.stack((best, worst)), torch.stack((relevant, other))  # (2, B, L)
    has_hard, has_easy = (pair.any(2).all(0) for pair in (hard, easy))
    kinds = (
        torch.where(has_hard[:, None], hard, easy),
        torch.where(has_easy[:, None], easy, hard),
    )
    allowed = torch.stack(kinds, dim=2)  # (2, B, P, L)
    # The position at which as many are counted as a uniform choice among them says
    counted = allowed.cumsum(3)
    rank = torch.minimum((uniform.transpose(0, 1) * counted[..., -1]).long() + 1, counted[..., -1])
    return (counted >= rank[..., None]).byte().argmax(3), ((has_hard | has_easy) * NUM_SALIENCY_PAIRS).tolist()


class Labels(list):
    """
    The labels of a batch. They stay where they are when a batch is sent to a device: there are many small tensors, and
    the loss sends them at once, padded.
    """

    def to(self, *args, **kwargs) -> "Labels":
        """Itself."""
        return self


class DiffusionVMRDataCollator:
    """
    Samples of a `MomentRetrievalDataset` -> the arguments of `DiffusionVMRForMomentRetrieval.forward`.

    Args:
        with_rows: add `rows` (B,), the samples' indices, and `covered_durations` (B,), for predictions.
    """

    def __init__(self, with_rows: bool = False):
        self.with_rows = with_rows

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = {}
        for name in ("video", "text", "negative_text"):
            if f"{name}_features" in samples[0]:
                batch[f"{name}_features"], batch[f"{name}_mask"] = DiffusionVMRProcessor.pad(
                    [sample[f"{name}_features"] for sample in samples]
                )
        for name in ("noisy_spans", "timesteps"):
            if name in samples[0]:
                batch[name] = torch.stack([sample[name] for sample in samples])
        if all("labels" in sample for sample in samples):
            batch["labels"] = Labels(sample["labels"] for sample in samples)
        if self.with_rows:
            batch["rows"] = torch.tensor([sample["row"] for sample in samples])
            batch["covered_durations"] = torch.tensor(
                [sample["covered_duration"] for sample in samples], dtype=torch.float64
            )
        return batch
