"""The processor prepares inputs (features to tensors) and decodes outputs (to moments in seconds)."""

import math
import reprlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .checks import check_positive, check_whole, is_number
from .hub import PushToHub
from .json_files import naming_json
from .spans import nms, span_to_window

MAX_LENGTH_GAP = 2  # released features of two backbones differ by up to 2 clips for the same video

POST_PROCESSING = ("threshold", "top_k", "nms_threshold", "round_to")
"""Options of `post_process_moment_retrieval`, and fields of the processor with their default values."""

TAKES_FEATURES = (
    "pass features, as processor(video_features, text_features), or search videos with "
    "pipeline('video-moment-retrieval', model=...)"
)


def average_down(features: Tensor, num_parts: int) -> Tensor:
    """Average features (L, D) over `num_parts` equal parts of the time that they cover. Return (num_parts, D)."""
    total = torch.cat((torch.zeros_like(features[:1]), features)).cumsum(0)
    edges = torch.linspace(0, len(features), num_parts + 1, dtype=torch.float64)
    clips = edges.long().clamp(max=len(features) - 1)  # the clip that each edge lies in
    at_edges = total[clips] + (edges - clips).float()[:, None] * features[clips]
    return at_edges.diff(dim=0) * (num_parts / len(features))


def normalize(features: Tensor, name: str, out: Tensor | None = None) -> Tensor:
    """
    Scale each vector of (L, D) to length 1, with the epsilon of Moment-DETR. Write the result to `out` if given.

    Raises:
        ValueError: if a value is NaN or infinite, or the length of a vector overflows float32. The message begins with
            `name`.
    """
    lengths = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    check_finite(lengths, name)
    return torch.div(features, lengths + 1e-5, out=out)


def common_length(lengths: Sequence[int], name: str) -> int:
    """
    Return the number of clips to use for a video: the minimum over the backbones, as in Moment-DETR.

    Raises:
        ValueError: if `lengths` differ by more than `MAX_LENGTH_GAP`. The message begins with `name`.
    """
    if max(lengths) - min(lengths) > MAX_LENGTH_GAP:
        raise ValueError(
            f"{name}: clip counts {list(lengths)} differ by more than {MAX_LENGTH_GAP}; are they from the same video?"
        )
    return min(lengths)


def check_finite(features: Tensor, name: str) -> None:
    """Raise ValueError if features (L, D) contain NaN or infinity. The message begins with `name`."""
    # Fast path: a finite sum means that all values are finite
    if not math.isfinite(features.sum().item()) and not features.isfinite().all():
        row = (~features.isfinite()).any(1).nonzero()[0].item()
        raise ValueError(f"{name}: features contain NaN or infinity in row {row}")


def check_post_processing(
    threshold: Any = None, top_k: Any = None, nms_threshold: Any = None, round_to: Any = None
) -> None:
    """Raise `ValueError` for an invalid option of `post_process_moment_retrieval`. `None` is a valid value."""
    if threshold is not None and not is_number(threshold):
        raise ValueError(f"`threshold` must be a number, got {threshold!r}")
    if top_k is not None:
        check_whole(top_k, "`top_k`", 0)
    if nms_threshold is not None and not (is_number(nms_threshold) and 0 <= nms_threshold <= 1):
        raise ValueError(f"`nms_threshold` must be between 0 and 1, got {nms_threshold!r}")
    if round_to is not None:
        check_positive(round_to, "`round_to`")


def check_outputs(outputs: Any) -> None:
    """Raise `ValueError` if a sample's scores, spans or saliency contain NaN or infinity. The message names it."""
    for name in ("logits", "pred_spans", "saliency_scores"):
        values = getattr(outputs, name, None)
        if values is None:
            continue
        finite = values.detach().isfinite().flatten(1).all(1)
        if not finite.all():
            sample = (~finite).nonzero()[0].item()
            raise ValueError(
                f"sample {sample}: `{name}` of the model contains NaN or infinity; are its weights damaged?"
            )


def check_durations(durations: Any, name: str, count: int) -> list[float]:
    """
    Return one duration in seconds per sample.

    Raises:
        ValueError: if there are not `count` of them, or if one is not a finite number above 0. The message begins with
            `name`.
    """
    values = durations.tolist() if isinstance(durations, (Tensor, np.ndarray)) else list(durations)
    if len(values) != count:
        raise ValueError(f"`{name}` must have one entry per sample ({count}), got {len(values)}")
    for index, value in enumerate(values):
        check_positive(value, f"`{name}[{index}]`")
    return values


class DiffusionVMRProcessor(PushToHub, ProcessorMixin):
    """
    Prepares features for the model and turns its outputs into moments. It does not contain the backbones.

    Args:
        video_feature_sizes: size of a clip's feature vector for each video backbone, in the order of concatenation.
        text_feature_size: size of a token's feature vector.
        max_clips: longer videos are averaged down to this number of clips.
        max_tokens: longer sentences are truncated to this number of tokens.
        threshold: minimum score of the returned moments.
        top_k: maximum number of returned moments. `None` returns all.
        nms_threshold: a moment is dropped if its IoU with a better one is above this value. `None` keeps all.
        round_to: round starts and ends to multiples of this number of seconds. `None` does not round.

    Raises:
        ValueError: if an argument is invalid. The message names it.
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
        is_list = isinstance(video_feature_sizes, Sequence) and not isinstance(video_feature_sizes, (str, bytes))
        if not is_list or not video_feature_sizes:
            raise ValueError(f"`video_feature_sizes` must be a list of whole numbers, got {video_feature_sizes!r}")
        for index, size in enumerate(video_feature_sizes):
            check_whole(size, f"`video_feature_sizes[{index}]`", 1)
        check_whole(text_feature_size, "`text_feature_size`", 1)
        check_whole(max_clips, "`max_clips`", 1)
        check_whole(max_tokens, "`max_tokens`", 1)
        if threshold is None:
            raise ValueError("`threshold` must be a number, got None")
        check_post_processing(threshold, top_k, nms_threshold, round_to)
        self.video_feature_sizes = list(video_feature_sizes)
        self.text_feature_size = text_feature_size
        self.max_clips = max_clips
        self.max_tokens = max_tokens
        self.threshold = threshold
        self.top_k = top_k
        self.nms_threshold = nms_threshold
        self.round_to = round_to

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in `ProcessorMixin`. Raise a ValueError that names processor_config.json if it is not a JSON object."""
        with naming_json(pretrained_model_name_or_path, **kwargs):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def __call__(
        self,
        video_features: Sequence = (),
        text_features: Sequence[np.ndarray] = (),
        return_tensors: str = "pt",
        **others,
    ) -> BatchFeature:
        """
        Args:
            video_features: B videos, each a sequence of arrays (L, D), one per backbone.
            text_features: B sentences, each an array (tokens, Dt).

        Returns:
            `video_features` (B, Lv, Dv), `video_mask` (B, Lv), `text_features` (B, Lt, Dt) and `text_mask` (B, Lt).

        Raises:
            ValueError: if features are invalid (see `prepare_video` and `prepare_text`), if the numbers of videos and
                sentences differ, or if videos or sentences are given in place of their features.
        """
        if others:
            raise ValueError(f"the processor takes no {', '.join(sorted(others))}; {TAKES_FEATURES}")
        for name, values in (("video_features", video_features), ("text_features", text_features)):
            if values is None or isinstance(values, str) or any(isinstance(value, str) for value in values):
                raise ValueError(f"`{name}` must be arrays, got {reprlib.repr(values)}; {TAKES_FEATURES}")
        if return_tensors != "pt":
            raise ValueError(f"`return_tensors` must be 'pt', got {return_tensors!r}")
        if len(video_features) != len(text_features):
            raise ValueError(f"got {len(video_features)} videos but {len(text_features)} sentences")
        if not len(video_features):
            raise ValueError("got no videos; at least one is required")
        videos, video_mask = self.pad([self.prepare_video(arrays) for arrays in video_features])
        texts, text_mask = self.pad([self.prepare_text(array) for array in text_features])
        return BatchFeature(
            {"video_features": videos, "video_mask": video_mask, "text_features": texts, "text_mask": text_mask}
        )

    def prepare_video(self, arrays: Sequence[np.ndarray], name: str = "the video") -> Tensor:
        """
        Prepare the features of one video, given as one array (L, D) per backbone. Return (Lv, Dv), float32.

        The features are normalized per backbone, cut to the shortest (released features differ by a clip or two),
        concatenated, and averaged down to `max_clips` if there are more clips.

        Raises:
            ValueError: if the number of backbones or a feature size is wrong, there are no clips, the numbers of clips
                differ by more than two, or a value is not finite. The message begins with `name`.
        """
        if len(arrays) != len(self.video_feature_sizes):
            raise ValueError(
                f"{name} has features of {len(arrays)} backbones, expected {len(self.video_feature_sizes)}"
            )
        checked = [
            self._checked(array, size, f"{name}, backbone {index}")
            for index, (array, size) in enumerate(zip(arrays, self.video_feature_sizes))
        ]
        length = common_length([len(array) for array in checked], name)
        features = torch.empty(length, sum(self.video_feature_sizes))
        parts = features.split(self.video_feature_sizes, dim=1)
        for index, (array, part) in enumerate(zip(checked, parts)):
            part.copy_(array[:length])
            normalize(part, f"{name}, backbone {index}", out=part)
        return average_down(features, self.max_clips) if length > self.max_clips else features

    def prepare_text(self, array: np.ndarray, name: str = "the sentence") -> Tensor:
        """
        Prepare the features (tokens, Dt) of one sentence: normalize each token and keep the first `max_tokens`.

        Raises:
            ValueError: if the feature size is wrong, there are no tokens, or a value is not finite. The message begins
                with `name`.
        """
        return normalize(self._checked(array, self.text_feature_size, name).float(), name)[: self.max_tokens]

    @staticmethod
    def _checked(array: np.ndarray, size: int, name: str) -> Tensor:
        array = np.asarray(array)
        if array.ndim != 2 or array.shape[1] != size:
            raise ValueError(f"{name}: features must be (length, {size}), got {array.shape}")
        if not len(array):
            raise ValueError(f"{name}: no features; at least one vector is required")
        if array.dtype.kind not in "fiu":
            raise ValueError(f"{name}: features must be real numbers, got {array.dtype}")
        if array.flags.writeable:
            return torch.from_numpy(array)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns about read-only (memory-mapped) arrays; we only read them
            return torch.from_numpy(array)

    @staticmethod
    def pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Pad B tensors (L, D) to (B, longest, D). Return them with their mask (B, longest)."""
        lengths = [len(row) for row in rows]
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return pad_sequence(list(rows), batch_first=True), mask.long()

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
        Turn the model's outputs into moments.

        Args:
            outputs: the output of `DiffusionVMRForMomentRetrieval` for B samples.
            covered_durations: seconds that the features of each sample cover, (B,).
            durations: duration of each video in seconds, (B,). Default: `covered_durations`.
            threshold, top_k, nms_threshold, round_to: override the processor's values.

        Returns:
            For each sample, a list of `{"start", "end", "score"}` in descending order of score, with times in seconds
            and 0 <= start <= end <= duration.

        Raises:
            ValueError: if an option is invalid, if the durations are not B finite numbers above 0, or if the outputs
                contain NaN or infinity. The message names the option, the duration or the sample.
        """
        threshold = self.threshold if threshold is None else threshold
        top_k = self.top_k if top_k is None else top_k
        nms_threshold = self.nms_threshold if nms_threshold is None else nms_threshold
        round_to = self.round_to if round_to is None else round_to

        check_post_processing(threshold, top_k, nms_threshold, round_to)
        count = len(outputs.logits)
        covered_seconds = check_durations(covered_durations, "covered_durations", count)
        seconds = covered_seconds if durations is None else check_durations(durations, "durations", count)
        check_outputs(outputs)

        scores = outputs.logits.detach().float().softmax(-1)[..., 0].cpu()
        # Use float64: in float32, a moment could end after a video of 30.1 s
        covered = torch.tensor(covered_seconds, dtype=torch.float64)[:, None, None]
        limits = torch.tensor(seconds, dtype=torch.float64)[:, None, None]
        windows = span_to_window(outputs.pred_spans.detach().cpu().double()) * covered
        if round_to is not None:
            windows = (windows / round_to).round() * round_to
        windows = torch.minimum(windows.clamp(min=0), limits)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        windows = windows.gather(1, order[..., None].expand(-1, -1, 2))

        results = []
        for sample_windows, sample_scores in zip(windows, scores):
            kept = sample_scores >= threshold
            sample_windows, sample_scores = sample_windows[kept], sample_scores[kept]
            if nms_threshold is not None:
                kept = nms(sample_windows, nms_threshold)
                sample_windows, sample_scores = sample_windows[kept], sample_scores[kept]
            moments = zip(sample_windows[:top_k].tolist(), sample_scores[:top_k].tolist())
            results.append([{"start": start, "end": end, "score": score} for (start, end), score in moments])
        return results


__all__ = ["DiffusionVMRProcessor"]
