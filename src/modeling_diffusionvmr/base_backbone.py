"""The interface of frozen backbones, which encode the clips of a video, or sentences, or both as features."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate
from tqdm.auto import tqdm

from .checks import check_whole
from .video import Frames, FrameSampling, Video


class VideoError(ValueError):
    """A video is damaged. Any other error of `encode_video` is a backbone's."""


class Backbone:
    """
    A frozen backbone. Subclass it for your own, and register it with `register_backbone`.

    A subclass that reads videos sets `feature_size` and implements `prepare` and `encode_clips`, and `sampling` if it
    reads more than one frame per clip. Several threads call these methods at once. A subclass that reads sentences sets
    `text_feature_size` and implements `encode_text`.

    Args:
        model: the network. It is frozen and set to eval mode.

    Attributes:
        feature_size: size of a clip's feature vector, or `None` if the backbone reads no video.
        text_feature_size: size of a token's feature vector, or `None` if the backbone reads no sentences.
    """

    feature_size: int | None = None
    text_feature_size: int | None = None

    def __init__(self, model: Any):
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, path_or_id: str | os.PathLike, subfolder: str = "", **hub_kwargs) -> "Backbone":
        """
        Load a complete checkpoint.

        Args:
            path_or_id: folder or Hub id.
            subfolder: the checkpoint is in this folder inside `path_or_id`.
            hub_kwargs: options of the Hub, such as `revision`, `token`, `cache_dir` and `local_files_only`.

        Raises:
            OSError: if there is no checkpoint, or a part of it is missing.
            ValueError: if weights are missing or not finite, or the parts do not fit together.
        """
        raise NotImplementedError

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Save a complete checkpoint, which `from_pretrained` loads."""
        self.model.save_pretrained(folder)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Backbone":
        """Move the model in place."""
        self.model.to(device=device, dtype=dtype)
        return self

    def sampling(self, clip_seconds: Fraction, fps: float) -> FrameSampling:
        """
        Return which frames of a clip the backbone reads. The default is one frame per clip.

        Args:
            clip_seconds: length of a clip in seconds.
            fps: average number of frames per second of the video, above 0.
        """
        return FrameSampling(1 / clip_seconds)

    def prepare(self, frames: Frames) -> Any:
        """
        Transform the frames of one clip, each (H, W, 3) uint8 RGB, to an input of the network, on the CPU: a tensor, or
        a dict of tensors. Their shapes are the same for all clips.
        """
        raise NotImplementedError

    def encode_clips(self, inputs: Any) -> np.ndarray:
        """Encode one batch of F prepared clips, stacked to tensors (F, ...), to (F, feature_size) float32."""
        raise NotImplementedError

    def encode_text(self, sentences: Sequence[str], max_tokens: int | None = None) -> list[np.ndarray]:
        """
        Encode each sentence to (tokens, text_feature_size) float32.

        Args:
            sentences: any number of sentences. The features of one do not depend on the others.
            max_tokens: longer sentences are truncated, with a warning.

        Raises:
            ValueError: if a sentence is not a string, is blank, or cannot be encoded as UTF-8.
        """
        raise NotImplementedError

    def encode_video(self, video: Video, batch_size: int = 32, progress: bool = False) -> np.ndarray:
        """Encode a video to (num_clips, feature_size) float32. See the function `encode_video`."""
        return encode_video([self], video, batch_size, progress)[0]


def encode_video(
    backbones: Sequence[Backbone],
    video: Video,
    batch_size: int = 32,
    progress: bool = False,
    advance: Callable[[float], None] | None = None,
) -> list[np.ndarray]:
    """
    Encode a video with several backbones in one decoding. While a batch is encoded, the next one is decoded and
    prepared in another thread. Clips that show the same frames as the one before are encoded once.

    Args:
        batch_size: frames per batch. A batch has at least one clip.
        progress: show a progress bar.
        advance: called after each batch with its share of the work. The shares sum to 1.

    Returns:
        One array (num_clips, feature_size) float32 per backbone.

    Raises:
        VideoError: if the video is damaged.
        ValueError: if `batch_size` is invalid.
        TypeError: if a backbone returns anything but one vector of its size per clip.
    """
    check_whole(batch_size, "`batch_size`", 1)
    features: list[list[np.ndarray]] = [[] for _ in backbones]
    total = video.num_clips * len(backbones)
    with tqdm(desc="encoding clips", total=total, disable=not progress) as bar:
        for which, inputs, repeats in _one_ahead(_prepared_batches(backbones, video, batch_size)):
            encoded = backbones[which].encode_clips(inputs)
            _check_encoded(encoded, backbones[which], len(repeats))
            features[which].append(np.repeat(encoded, repeats, axis=0))
            bar.update(sum(repeats))
            if advance is not None:
                advance(sum(repeats) / total)
    return [np.concatenate(arrays) for arrays in features]


def _check_encoded(encoded: Any, backbone: Backbone, num_clips: int) -> None:
    wanted = (num_clips, backbone.feature_size)
    if not isinstance(encoded, np.ndarray) or encoded.shape != wanted or encoded.dtype != np.float32:
        found = f"{encoded.shape} {encoded.dtype}" if isinstance(encoded, np.ndarray) else type(encoded).__name__
        raise TypeError(f"{type(backbone).__name__}.encode_clips must return an array {wanted} float32, got {found}")


def _prepared_batches(
    backbones: Sequence[Backbone], video: Video, batch_size: int
) -> Iterator[tuple[int, Any, list[int]]]:
    """Yield batches: the index of a backbone, its prepared clips, and how many successive clips each of them is."""
    samplings = [backbone.sampling(video.exact_clip_seconds, video.fps) for backbone in backbones]
    latest: list[Frames] = [()] * len(backbones)
    inputs: list[list[Any]] = [[] for _ in backbones]
    repeats: list[list[int]] = [[] for _ in backbones]
    for which, frames in _decoded(video, samplings):
        if latest[which] and all(one is other for one, other in zip(latest[which], frames)):
            repeats[which][-1] += 1
            continue
        if len(inputs[which]) == max(1, batch_size // len(frames)):
            yield which, default_collate(inputs[which]), repeats[which]
            inputs[which], repeats[which] = [], []
        inputs[which].append(backbones[which].prepare(frames))
        repeats[which].append(1)
        latest[which] = frames
    for which in range(len(backbones)):
        yield which, default_collate(inputs[which]), repeats[which]


def _decoded(video: Video, samplings: Sequence[FrameSampling]) -> Iterator[tuple[int, Frames]]:
    """Yield what `video.clips` yields. Raise `VideoError` if the video is damaged."""
    try:
        yield from video.clips(samplings)
    except ValueError as error:
        raise VideoError(str(error)) from error


def _one_ahead(items: Iterable[Any]) -> Iterator[Any]:
    """Yield the same items. While the caller uses one, a thread computes the next one."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as executor:
        item = executor.submit(next, iterator, end).result()
        while item is not end:
            following = executor.submit(next, iterator, end)
            yield item
            item = following.result()
