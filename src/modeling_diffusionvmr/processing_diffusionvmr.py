"""The one door into the model and back: features -> tensors, and the model's output -> moments in seconds."""

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .spans import nms, span_to_window

MAX_LENGTH_GAP = 2  # clips by which released features of two backbones differ for the same video


def average_down(features: Tensor, num_parts: int) -> Tensor:
    """The means of features (L, D) over `num_parts` equal parts of the time that they cover: (num_parts, D)."""
    total = torch.cat((torch.zeros_like(features[:1]), features)).cumsum(0)
    edges = torch.linspace(0, len(features), num_parts + 1, dtype=torch.float64)
    whole = edges.long().clamp(max=len(features) - 1)
    at_edges = total[whole] + (edges - whole).float()[:, None] * features[whole]
    return at_edges.diff(dim=0) * (num_parts / len(features))


def normalize(features: Tensor, name: str, out: Tensor | None = None) -> Tensor:
    """
    Each vector of (L, D) at length 1, as Moment-DETR does (its epsilon too), written to `out` where it is given.

    Raises:
        ValueError: for NaN, infinity, or vectors so long that their length is no float32; it begins with `name`.
    """
    lengths = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    check_finite(lengths, name)
    return torch.div(features, lengths + 1e-5, out=out)


def common_length(lengths: Sequence[int], name: str) -> int:
    """
    The clips of a video whose backbones have `lengths`: those of the shortest, as in Moment-DETR, since released
    features differ by a clip or two. Raises `ValueError`, which begins with `name`, where they differ by more.
    """
    if max(lengths) - min(lengths) > MAX_LENGTH_GAP:
        raise ValueError(f"{name}: its backbones have {list(lengths)} clips, which is not the same video")
    return min(lengths)


def check_finite(features: Tensor, name: str) -> None:
    """Raises `ValueError`, which begins with `name`, for NaN or infinity in features (L, D)."""
    # One number tells of all that is well, and is cheap
    if not math.isfinite(features.sum().item()) and not features.isfinite().all():
        row = (~features.isfinite()).any(1).nonzero()[0].item()
        raise ValueError(f"{name}: features have NaN or infinity in row {row}")


class DiffusionVMRProcessor(ProcessorMixin):
    """
    Holds no model: backbones' features come in, and are described by these fields.

    Args:
        video_feature_sizes: numbers a clip of each video backbone, in the order of concatenation.
        text_feature_size: numbers a token.
        max_clips: a longer video is averaged down to as many equal parts.
        max_tokens: of a longer sentence the first ones are used.
        threshold: the least score of a moment that is returned.
        top_k: the most moments that are returned; `None` for all.
        nms_threshold: a moment is dropped whose IoU with a better one is above it; `None` keeps all.
        round_to: starts and ends are rounded to multiples of so many seconds; `None` leaves them.
    """

    def __init__(
        self,
        video_feature_sizes: Sequence[int] = (2304, 512),
        text_feature_size: int = 512,
        max_clips: int = 75,
        max_tokens: int = 32,
        threshold: float = 0.0,
        top_k: int | None = None,
        nms_threshold: float | None = None,
        round_to: float | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        for name, value in (("max_clips", max_clips), ("max_tokens", max_tokens)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self._check_options(threshold, top_k, nms_threshold, round_to)
        self.video_feature_sizes = list(video_feature_sizes)
        self.text_feature_size = text_feature_size
        self.max_clips = max_clips
        self.max_tokens = max_tokens
        self.threshold = threshold
        self.top_k = top_k
        self.nms_threshold = nms_threshold
        self.round_to = round_to

    def __call__(
        self, video_features: Sequence, text_features: Sequence[np.ndarray], return_tensors: str = "pt"
    ) -> BatchFeature:
        """
        Args:
            video_features: B videos, each a sequence of arrays (L, D), one a backbone.
            text_features: B sentences, each an array (tokens, Dt).

        Returns:
            `video_features` (B, Lv, Dv), `video_mask` (B, Lv), `text_features` (B, Lt, Dt), `text_mask` (B, Lt).

        Raises:
            ValueError: for features that `prepare_video` and `prepare_text` refuse, or counts that differ.
        """
        if return_tensors != "pt":
            raise ValueError(f"`return_tensors` must be 'pt', got {return_tensors!r}")
        if len(video_features) != len(text_features):
            raise ValueError(f"there are {len(video_features)} videos but {len(text_features)} sentences")
        if not len(video_features):
            raise ValueError("there are no videos, at least one is needed")
        videos, video_mask = self.pad([self.prepare_video(arrays) for arrays in video_features])
        texts, text_mask = self.pad([self.prepare_text(array) for array in text_features])
        return BatchFeature(
            {"video_features": videos, "video_mask": video_mask, "text_features": texts, "text_mask": text_mask}
        )

    def prepare_video(self, arrays: Sequence[np.ndarray], name: str = "the video") -> Tensor:
        """
        Features of one video, an array (L, D) a backbone -> (Lv, Dv), float32.

        Each backbone's clips are normalised, all are cut to the shortest (released features differ by a clip or two),
        concatenated, and averaged down to `max_clips` where there are more.

        Raises:
            ValueError: for another number of backbones, sizes that do not fit, no clips, lengths that differ by more
                than two clips, or values that are no finite numbers. It begins with `name`.
        """
        if len(arrays) != len(self.video_feature_sizes):
            raise ValueError(
                f"{name} has features of {len(arrays)} backbones, expected {len(self.video_feature_sizes)}"
            )
        arrays = [
            self._checked(array, size, f"{name}, backbone {index}")
            for index, (array, size) in enumerate(zip(arrays, self.video_feature_sizes))
        ]
        length = common_length([len(array) for array in arrays], name)
        features = torch.empty(length, sum(self.video_feature_sizes))
        parts = features.split(self.video_feature_sizes, dim=1)
        for index, (array, part) in enumerate(zip(arrays, parts)):
            part.copy_(array[:length])
            normalize(part, f"{name}, backbone {index}", out=part)
        return average_down(features, self.max_clips) if length > self.max_clips else features

    def prepare_text(self, array: np.ndarray, name: str = "the sentence") -> Tensor:
        """
        Features of one sentence, (tokens, Dt) -> the first `max_tokens` of them, each normalised, float32.

        Raises:
            ValueError: for another size, no tokens, or values that are no finite numbers. It begins with `name`.
        """
        return normalize(self._checked(array, self.text_feature_size, name).float(), name)[: self.max_tokens]

    @staticmethod
    def _checked(array: np.ndarray, size: int, name: str) -> Tensor:
        array = np.asarray(array)
        if array.ndim != 2 or array.shape[1] != size:
            raise ValueError(f"{name}: features must be (length, {size}), got {array.shape}")
        if not len(array):
            raise ValueError(f"{name}: there are no features, at least one vector is needed")
        if array.dtype.kind not in "fiu":
            raise ValueError(f"{name}: features must be real numbers, got {array.dtype}")
        if array.flags.writeable:
            return torch.from_numpy(array)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is mapped to be read: nothing is written to it
            return torch.from_numpy(array)

    @staticmethod
    def pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """B tensors (L, D) -> (B, longest, D) and its mask (B, longest)."""
        lengths = torch.tensor([len(row) for row in rows])
        return pad_sequence(list(rows), batch_first=True), (torch.arange(lengths.max()) < lengths[:, None]).long()

    def post_process_moment_retrieval(
        self,
        outputs,
        covered_durations: Sequence[float],
        durations: Sequence[float] | None = None,
        threshold: float | None = None,
        top_k: int | None = None,
        nms_threshold: float | None = None,
        round_to: float | None = None,
    ) -> list[list[dict[str, float]]]:
        """
        The model's output -> moments.

        Args:
            outputs: of `DiffusionVMRForMomentRetrieval`.
            covered_durations: seconds that each sample's features cover, (B,).
            durations: seconds of each video, where they differ.
            threshold, top_k, nms_threshold, round_to: override the processor's own.

        Raises:
            ValueError: for options that make no sense, and another number of durations than samples.

        Returns:
            For each sample a list of `{"start", "end", "score"}` by falling score, 0 <= start <= end <= duration.
        """
        threshold = self.threshold if threshold is None else threshold
        top_k = self.top_k if top_k is None else top_k
        nms_threshold = self.nms_threshold if nms_threshold is None else nms_threshold
        round_to = self.round_to if round_to is None else round_to

        self._check_options(threshold, top_k, nms_threshold, round_to)
        for name, seconds in (("covered_durations", covered_durations), ("durations", durations)):
            if seconds is not None and len(seconds) != len(outputs.logits):
                raise ValueError(f"`{name}` has {len(seconds)} entries for {len(outputs.logits)} samples")

        scores = outputs.logits.detach().float().softmax(-1)[..., 0].cpu()
        # In double precision, or the end of a video of 30.1 s would be beyond 30.1
        covered = torch.as_tensor(covered_durations, dtype=torch.float64)[:, None, None]
        limits = covered if durations is None else torch.as_tensor(durations, dtype=torch.float64)[:, None, None]
        windows = span_to_window(outputs.pred_spans.detach().cpu().double()) * covered
        if round_to is not None:
            windows = (windows / round_to).round() * round_to
        windows = torch.minimum(windows.clamp(min=0), limits)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        windows = windows.gather(1, order[..., None].expand(-1, -1, 2))

        results = []
        for sample_windows, sample_scores in zip(windows, scores):
            keep = sample_scores >= threshold
            if nms_threshold is not None:
                keep &= nms(sample_windows, nms_threshold)
            moments = zip(sample_windows[keep][:top_k].tolist(), sample_scores[keep][:top_k].tolist())
            results.append([{"start": start, "end": end, "score": score} for (start, end), score in moments])
        return results

    @staticmethod
    def _check_options(threshold, top_k, nms_threshold, round_to):
        for name, value, valid, rule in (
            ("threshold", threshold, lambda value: math.isfinite(value), "a number"),
            ("top_k", top_k, lambda value: value >= 0, "0 or more"),
            ("nms_threshold", nms_threshold, lambda value: 0 <= value <= 1, "in 0 to 1"),
            ("round_to", round_to, lambda value: 0 < value < math.inf, "a number of seconds above 0"),
        ):
            if value is not None and not valid(value):
                raise ValueError(f"`{name}` must be {rule}, got {value}")


__all__ = ["DiffusionVMRProcessor"]
