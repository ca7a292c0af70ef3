"""Rows and features -> samples, with the random draws of training; samples -> batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .annotations import check_row
from .configuration_diffusionvmr import DiffusionVMRConfig
from .diffusion import DiffusionSchedule
from .processing_diffusionvmr import DiffusionVMRProcessor
from .spans import relevant_clips, window_to_span

NUM_SALIENCY_PAIRS = 2  # a sample's, as in Moment-DETR


class MomentRetrievalDataset(Dataset):
    """
    One sample a row (a query on its video), as tensors.

    All that is random in a training sample is drawn here from (seed, epoch, row), so that it does not depend on how
    rows are shuffled, batched or spread over workers.

    Args:
        rows: from `load_annotations`, or any sequence of dicts with `qid, query, vid, duration, relevant_windows`.
        video_features: a mapping from `vid` to an array (clips, size), or a sequence of them, one a backbone.
        text_features: a mapping from `qid` to an array (tokens, size).
        processor: the door into the model.
        config: of the model that is trained; its samples carry draws. `None` for inference.
        clip_seconds: length of a clip; `None` where the features cover the whole `duration`.
        seed: of the draws.

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
    ):
        self.rows = [self._checked(row) for row in rows]
        self.video_features = [video_features] if isinstance(video_features, Mapping) else list(video_features)
        self.text_features = text_features
        self.processor = processor
        self.config = config
        self.clip_seconds = clip_seconds
        self.seed = seed
        self._check_features()
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers that live on see it change
        if config is not None:
            self.schedule = DiffusionSchedule(config.num_diffusion_steps, config.signal_scale)
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

    def _check_features(self):
        for row in self.rows:
            for store in self.video_features:
                if row["vid"] not in store:
                    raise ValueError(f"qid {row['qid']}: no features of video {row['vid']} in {_name(store)}")
            if row["qid"] not in self.text_features:
                raise ValueError(f"qid {row['qid']}: no features of its sentence in {_name(self.text_features)}")

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
        row = self.rows[index]
        arrays = [store[row["vid"]] for store in self.video_features]
        covered = self.covered_duration(row, min(map(len, arrays)))
        sample = {
            "row": index,
            "covered_duration": covered,
            "video_features": self.processor.prepare_video(arrays, f"video {row['vid']}"),
            "text_features": self.processor.prepare_text(self.text_features[row["qid"]], f"qid {row['qid']}"),
        }
        if "relevant_windows" in row:
            sample["labels"] = {"spans": self._spans(row, covered)}
        if self.config is not None:
            if "labels" not in sample:
                raise ValueError(f"qid {row['qid']}: training needs its `relevant_windows`")
            self._draw(index, sample)
        return sample

    @staticmethod
    def _spans(row: Mapping[str, Any], covered: float) -> Tensor:
        windows = torch.tensor(row["relevant_windows"], dtype=torch.float32).reshape(-1, 2)
        windows = windows / covered
        # Of a window that reaches beyond the features, the part that they cover; of one wholly beyond, nothing
        return window_to_span(windows[windows[:, 0] < 1].clamp(max=1))

    def _draw(self, index: int, sample: dict[str, Any]):
        random = torch.Generator()
        random.manual_seed(int(np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1)[0]))
        spans = sample["labels"]["spans"]
        count = torch.tensor([len(spans)])
        noisy_spans, timesteps = self.schedule.corrupt(
            spans[None], count, self.config.max_training_proposals, generator=random
        )
        sample["noisy_spans"], sample["timesteps"] = noisy_spans[0], timesteps[0]

        num_clips = len(sample["video_features"])
        relevant = relevant_clips(
            spans[None], torch.ones(1, len(spans), dtype=torch.bool), torch.tensor([num_clips]), num_clips
        )[0]
        pairs = NUM_SALIENCY_PAIRS if relevant.any() and not relevant.all() else 0
        for name, clips in (("saliency_pos", relevant.nonzero()[:, 0]), ("saliency_neg", (~relevant).nonzero()[:, 0])):
            chosen = torch.randint(max(len(clips), 1), (pairs,), generator=random)
            sample["labels"][name] = clips[chosen] if pairs else chosen

        other = torch.randint(len(self.rows) - self._count[index], (), generator=random).item()
        other += self._count[index] * (other >= self._first[index])
        qid = self.rows[self._by_video[other]]["qid"]
        sample["negative_text_features"] = self.processor.prepare_text(self.text_features[qid], f"qid {qid}")


def _name(store: Mapping) -> str:
    return str(getattr(store, "path", "the given mapping"))


class DiffusionVMRDataCollator:
    """Samples of a `MomentRetrievalDataset` -> the arguments of `DiffusionVMRForMomentRetrieval.forward`."""

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
        if "labels" in samples[0]:
            batch["labels"] = [sample["labels"] for sample in samples]
        return batch
