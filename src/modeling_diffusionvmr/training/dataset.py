"""The dataset: turns rows and features into samples, and makes the random draws of training."""

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..checks import check_positive
from ..configuration_diffusionvmr import DiffusionVMRConfig
from ..data.annotations import check_row, warn_skipped
from ..data.features import common_clip_seconds, name_of
from ..diffusion import DiffusionSchedule
from ..processing_diffusionvmr import DiffusionVMRProcessor
from ..windows import SearchWindow, plan_windows
from .negative_sentences import NegativeSentences
from .row_windows import draw_window, row_in_window
from .supervision import clip_scores, draw_saliency_pairs, true_spans

# Fields of the config that the random draws depend on
DRAWING_FIELDS = ("max_training_proposals", "num_diffusion_steps", "signal_scale", "absent_loss_coefficient")
MAX_CLIPS_APART, MAX_SHARE_APART = 2, 0.1  # a video may last this much more or less than its features cover
MAX_AVERAGED_VIDEOS = 256  # kept in memory: 1.2 MB each with features of VGG or C3D


class MomentRetrievalDataset(Dataset):
    """
    One sample per row (a query on its video) or, with `windows`, per search window of its video, as tensors.

    The random part of a training sample depends only on (seed, epoch, row), and not on how rows are shuffled, batched
    or distributed over workers.

    Args:
        rows: from `load_annotations`, or any sequence of dicts with `qid`, `query`, `vid`, `duration` (seconds) and
            `relevant_windows` ([[start, end], ...], seconds; `[]` if the query is not in the video; missing if the row
            is unlabeled).
        video_features: a mapping from `vid` to an array (clips, size), or a sequence of them, one per backbone.
        text_features: a mapping from `qid` to an array (tokens, size).
        processor: prepares the features.
        config: the configuration of the model to train, which gives samples their random part. `None` for inference.
        clip_seconds: the length of a clip. Default: the length that the feature stores state; if they state none, the
            features cover the whole `duration`.
        seed: seed of the random part.
        skip_invalid: read all features once and skip rows with unusable features, with one warning that lists them.
        windows: search videos of more than `max_clips` clips in windows, as the pipeline does, instead of averaging
            them down. In training, a sample is one window of a row's video, drawn anew in each epoch; otherwise, each
            window is a sample, and predictions are merged. Features of all videos are read once for their lengths, and
            again for each sample, so keep them in memory: `dict(open_features(path))`.

    Attributes:
        name: a name for the model's card, or the Hub id of the data. Never a path of this machine.
        split: the split for the model's card, if the data have several.

    Raises:
        ValueError: if `check_row` rejects a row, a window ends after its video, or features are missing; or if a model
            cannot be trained on the rows, because there is no sentence of another video for some row. Reading a sample
            also raises it if the processor rejects the features. The message names the qid or vid.
    """

    name = "unnamed data"
    split: str | None = None

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
        windows: bool = False,
    ):
        self.video_features = [video_features] if isinstance(video_features, Mapping) else list(video_features)
        self.text_features = text_features
        self.processor = processor
        self.config = config
        self.clip_seconds = common_clip_seconds(self.video_features) if clip_seconds is None else clip_seconds
        if self.clip_seconds is not None:
            check_positive(self.clip_seconds, "`clip_seconds`")
        self.seed = seed
        self._averaged: dict[str, tuple[Tensor, int]] = {}
        self.rows = [self._checked(row) for row in rows]
        if skip_invalid:
            self.rows, skipped = self._readable()
            if skipped:
                warn_skipped("features", skipped, len(self.rows))
        else:
            for row in self.rows:
                self._check_present(row)
        self.windows = self._plan_windows() if windows else None
        self._has_warned = False
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # persistent workers see it change
        if config is not None:
            for row in self.rows:
                if "relevant_windows" not in row:
                    raise ValueError(f"qid {row['qid']}: training needs `relevant_windows`")
            self.schedule = DiffusionSchedule(config.num_diffusion_steps, config.signal_scale)
            self._negatives = NegativeSentences(self.rows, must_be_absent=config.absent_loss_coefficient > 0)

    @staticmethod
    def _checked(row: Mapping[str, Any]) -> dict[str, Any]:
        try:
            checked = check_row(row)
        except ValueError as error:
            raise ValueError(f"qid {row.get('qid')}: {error}") from None
        inside_video = checked.get("relevant_windows", [])
        for window, inside in zip(row["relevant_windows"] if inside_video else [], inside_video):
            if list(window) != inside:
                raise ValueError(f"qid {row['qid']}: {window} ends after the video, at {row['duration']} s")
        return checked

    def _check_present(self, row: Mapping[str, Any]) -> None:
        for store in self.video_features:
            if row["vid"] not in store:
                raise ValueError(f"qid {row['qid']}: no features of video {row['vid']} in {name_of(store)}")
        if row["qid"] not in self.text_features:
            raise ValueError(f"qid {row['qid']}: no features of its sentence in {name_of(self.text_features)}")

    def _readable(self) -> tuple[list[dict[str, Any]], list[str]]:
        faults: dict[str, ValueError | None] = {}  # each video is read once
        kept, skipped = [], []
        for row in tqdm(self.rows, desc="reading all features"):
            try:
                self._check_present(row)
                if row["vid"] not in faults:
                    faults[row["vid"]] = None
                    try:
                        self._video(row)
                    except ValueError as error:
                        faults[row["vid"]] = error
                fault = faults[row["vid"]]
                if fault is not None:
                    raise fault
                self._text(row)
            except ValueError as error:
                message = str(error)
                skipped.append(message if message.startswith(f"qid {row['qid']}:") else f"qid {row['qid']}: {message}")
            else:
                kept.append(row)
        if not kept:
            raise ValueError(f"none of {len(self.rows)} rows has usable features; {skipped[0]}")
        return kept, skipped

    def _plan_windows(self) -> dict[str, list[SearchWindow]]:
        """Return the windows of each video."""
        lengths = {row["vid"]: min(len(store[row["vid"]]) for store in self.video_features) for row in self.rows}
        return {vid: plan_windows(length, self.processor.max_clips) for vid, length in lengths.items()}

    @cached_property
    def samples(self) -> list[tuple[int, SearchWindow | None]]:
        """The row index and the window of each sample: `None` for the whole video, or to draw one in training."""
        if self.windows is None or self.config is not None:
            return [(index, None) for index in range(len(self.rows))]
        return [(index, window) for index, row in enumerate(self.rows) for window in self.windows[row["vid"]]]

    def __len__(self) -> int:
        return len(self.samples)

    def check_config(self, config: DiffusionVMRConfig) -> None:
        """
        Raise `ValueError` unless a model with this configuration can be trained on the dataset. Without a `config`,
        samples have no negative sentences and saliency pairs, and their loss terms would be 0.
        """
        advice = "pass config=model.config to MomentRetrievalDataset"
        if self.config is None:
            raise ValueError(f"the training dataset was built without `config`: {advice}")
        for field in DRAWING_FIELDS:
            own, needed = getattr(self.config, field), getattr(config, field)
            if own != needed:
                raise ValueError(f"the training dataset was built with {field}={own}, the model has {needed}: {advice}")

    @property
    def epoch(self) -> int:
        """The epoch that the random part of the samples depends on."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; `Trainer` calls this."""
        self._epoch.fill_(epoch)

    def covered_duration(self, row: Mapping[str, Any], num_clips: int) -> float:
        """Return the seconds that the features of a row's video cover."""
        return row["duration"] if self.clip_seconds is None else num_clips * self.clip_seconds

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return several samples. `DataLoader` calls this to fetch a batch."""
        samples = [self._sample(range(len(self))[index]) for index in indices]  # -1 is the last one
        if self.config is not None:
            self._add_draws(samples, self.config.max_training_proposals)
        return samples

    def _sample(self, index: int) -> dict[str, Any]:
        row_index, window = self.samples[index]
        row = self.rows[row_index]
        if self._windows_of(row):
            row, video, covered = self._window(row_index, window)
        else:
            video, covered = self._video(row)
        sample = {
            "index": index,
            "covered_duration": covered,
            "video_features": video,
            "text_features": self._text(row),
        }
        if "relevant_windows" in row:
            spans = true_spans(row["relevant_windows"], covered)
            if len(spans) < len(row["relevant_windows"]):
                self._warn_of_lost_windows(row, covered)
            sample["labels"] = {"spans": spans}
        self._check_duration(row, covered)
        return sample

    def _windows_of(self, row: Mapping[str, Any]) -> list[SearchWindow]:
        """Return the windows in which a row's video is searched, empty if the whole video is one sample."""
        windows = [] if self.windows is None else self.windows[row["vid"]]
        return windows if len(windows) > 1 else []

    def _window(self, row_index: int, window: SearchWindow | None) -> tuple[dict[str, Any], Tensor, float]:
        """
        Return a row as if its video were only the given window (`None`: draw one), the features (Lv, Dv) of the window,
        and the seconds that they cover.
        """
        row = self.rows[row_index]
        windows = self._windows_of(row)
        num_clips = windows[-1].last
        covered = self.covered_duration(row, num_clips)
        if window is None:
            rng = np.random.default_rng((self.seed, self.epoch, row_index, 1))
            window = draw_window(row, windows, covered / num_clips, rng)
        arrays = [store[row["vid"]][window.first : window.last] for store in self.video_features]
        seconds = covered * (window.last - window.first) / num_clips
        features = self.processor.prepare_video(arrays, f"video {row['vid']}")
        return row_in_window(row, window, covered / num_clips), features, seconds

    def _check_duration(self, row: Mapping[str, Any], covered: float) -> None:
        """Warn once of features that cover another time than the video lasts: its moments would be elsewhere."""
        gap = abs(covered - row["duration"])
        if self._has_warned or self.clip_seconds is None:
            return
        if gap > MAX_CLIPS_APART * self.clip_seconds + MAX_SHARE_APART * row["duration"]:
            self._has_warned = True
            warnings.warn(
                f"qid {row['qid']}: its video lasts {row['duration']:g} s, but the features cover {covered:g} s. Other "
                "rows may differ too; check `duration` and the length of a clip.",
                stacklevel=5,
            )

    def _warn_of_lost_windows(self, row: Mapping[str, Any], covered: float) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"qid {row['qid']}: a window lies entirely beyond the {covered:g} s that the features of its video "
                "cover, and is ignored. Other rows may have such windows too; check the length of a clip.",
                stacklevel=5,
            )

    def _video(self, row: Mapping[str, Any]) -> tuple[Tensor, float]:
        """Return the features (Lv, Dv) of a row's video and the seconds that they cover."""
        vid = row["vid"]
        if vid in self._averaged:
            features, length = self._averaged[vid]
        else:
            arrays = [store[vid] for store in self.video_features]
            features, length = self.processor.prepare_video(arrays, f"video {vid}"), min(map(len, arrays))
            # Averaged videos are small, slow to read, and may have many queries (TACoS: 130 each)
            if length > len(features) and len(self._averaged) < MAX_AVERAGED_VIDEOS:
                self._averaged[vid] = features, length
        return features, self.covered_duration(row, length)

    def _text(self, row: Mapping[str, Any]) -> Tensor:
        return self.processor.prepare_text(self.text_features[row["qid"]], f"qid {row['qid']}")

    def _add_draws(self, samples: Sequence[dict[str, Any]], num_proposals: int) -> None:
        """Add the random part of training samples: a sentence of another video, saliency pairs and noisy spans."""
        rngs = [np.random.default_rng((self.seed, self.epoch, sample["index"])) for sample in samples]
        for sample, rng in zip(samples, rngs):
            row, labels = self.rows[sample["index"]], sample["labels"]
            sample["negative_text_features"] = self._text(self._negatives.draw(sample["index"], rng))
            if self._windows_of(row):
                row = {}  # annotators' scores are of clips of the whole video
            scores = clip_scores(row, labels["spans"], sample["covered_duration"], len(sample["video_features"]))
            labels["saliency_pos"], labels["saliency_neg"] = draw_saliency_pairs(scores, rng)

        # Add noise to the whole batch at once: sample by sample, this would take 5 % of a training step
        spans = [sample["labels"]["spans"] for sample in samples]
        counts, padded = torch.tensor([len(own) for own in spans]), pad_sequence(spans, batch_first=True)
        draws = self.schedule.draw_samples(rngs, padded.shape[1], num_proposals)
        for sample, noisy_spans, timestep in zip(samples, *self.schedule.corrupt(padded, counts, draws)):
            sample["noisy_spans"], sample["timesteps"] = noisy_spans, timestep
