"""`pipeline("video-moment-retrieval")`: find moments in a video from sentences."""

import math
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import Pipeline

from .backbones import Backbones
from .checkpoint import check_processor, load_backbones, origin_of
from .checks import check_positive, check_sentence, check_whole
from .configuration_diffusionvmr import DiffusionVMRConfig
from .diffusion import check_num_sampling_steps
from .hub import PushToHub
from .processing_diffusionvmr import POST_PROCESSING, DiffusionVMRProcessor, check_post_processing, common_length
from .video import Video, open_video
from .weights import check_weights
from .windows import SearchWindow, check_chunks, plan_windows, search

# The options of a call, by the method that takes them
PREPROCESS_OPTIONS = ("max_download_bytes", "max_video_seconds", "progress")
FORWARD_OPTIONS = ("num_proposals", "num_sampling_steps", "chunk_length_s", "stride_length_s", "progress")
POSTPROCESS_OPTIONS = (*POST_PROCESSING, "return_saliency")


@dataclass(frozen=True)
class EncodedVideo:
    """
    A video that `VideoMomentRetrievalPipeline.encode` has encoded. A call takes it in place of the video, to search it
    again without decoding it again. The pipeline must have the same backbones. Their number, the sizes of the features
    and `clip_seconds` are checked, and the ids of backbones that are on the Hub. Others cannot be told apart.

    Args:
        duration: in seconds.
        clip_seconds: length of a clip in seconds.
        features: one array (num_clips, feature_size) float32 per video backbone.
        backbone_ids: the Hub id of each video backbone, or `None` for one that is in a folder.

    Raises:
        ValueError: if a value is invalid, or if the numbers of clips differ by more than two.
    """

    duration: float
    clip_seconds: float
    features: Sequence[np.ndarray] = field(repr=False)
    backbone_ids: Sequence[str | None] = ()

    def __post_init__(self):
        check_positive(self.duration, "`duration` of an encoded video")
        check_positive(self.clip_seconds, "`clip_seconds` of an encoded video")
        arrays = self.features if isinstance(self.features, Sequence) else ()
        shapes = [getattr(array, "shape", ()) for array in arrays]
        if not shapes or any(len(shape) != 2 or 0 in shape for shape in shapes):
            raise ValueError(
                "`features` of an encoded video must be a list of one array (num_clips, feature_size) per video "
                f"backbone, got {reprlib.repr(self.features)}"
            )
        common_length([length for length, _ in shapes], "an encoded video")
        ids = self.backbone_ids
        if isinstance(ids, str) or not isinstance(ids, Sequence) or len(ids) not in (0, len(shapes)):
            raise ValueError(f"`backbone_ids` of an encoded video must be one per array of `features`, got {ids!r}")

    @property
    def num_clips(self) -> int:
        """Number of clips: the minimum over the backbones."""
        return min(map(len, self.features))


class VideoMomentRetrievalPipeline(PushToHub, Pipeline):
    """
    Finds the moments of a video that a sentence describes.

    Args:
        backbones: the frozen backbones. Default: those of the checkpoint, loaded from a subfolder or from the Hub. They
            are moved to the device and dtype of the pipeline.
        args, kwargs: arguments of `Pipeline`, and default values for the arguments of a call.

    Raises:
        OSError, ValueError: if the checkpoint is not one of a DiffusionVMR model, if it lacks weights or backbones, or
            if its backbones cannot be run. The message names them.
    """

    processor: DiffusionVMRProcessor
    # `__init__` loads the processor, because `pipeline` cannot for a model in memory. `Pipeline` declares these five as
    # None, and reads booleans
    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_video_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]

    def __init__(self, *args, backbones: Backbones | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        model, config = self.model.eval(), self.model.config
        if config.model_type != DiffusionVMRConfig.model_type:
            raise ValueError(f"{config.name_or_path}: a model of type {config.model_type}, not DiffusionVMR")
        name = config.name_or_path or "the model"
        check_weights(model, model.missing_weights, name)
        if self.processor is None:
            self.processor = load_processor_of(model)
        elif isinstance(self.processor, str):
            self.processor = DiffusionVMRProcessor.from_pretrained(self.processor)
        check_processor(self.processor, config, name)
        if backbones is None:
            backbones = load_backbones(config, origin_of(model), sources=model.backbone_sources, **model.hub_kwargs)
        self.backbones = backbones.to(self.device, self.model.dtype)
        self._check_chunks(self._forward_params)  # only now, because the check needs the length of a clip

    # Here and below, `Pipeline` uses other names for the same arguments, but always passes them by position
    def __call__(  # type: ignore[override]
        self, video: Any, query: str | list[str] | None = None, batch_size: int | None = None, **kwargs
    ) -> Any:
        """
        Args:
            video: a path, an `http(s)://` or `file://` URL, a binary file object, a row of a `datasets` column of type
                `Video`, `(frames, fps)` with frames (T, H, W, 3) uint8 RGB, or what `open_video` or `encode` returned.
                For many videos and one `query`, an iterable of these (a list, a generator, a `KeyDataset`). For many
                videos with their own queries, an iterable of `{"video": ..., "query": ...}` and no `query`; other keys
                are ignored.
            query: a sentence or a list of sentences. Each video is decoded and encoded once for all of them.
            batch_size: only 1 is possible. Frames and sentences of one video are encoded in batches of their own.
            top_k: maximum number of moments per query.
            threshold: minimum score of a moment.
            nms_threshold: a moment is dropped if its IoU with a better one is above this value.
            round_to: round starts and ends to multiples of this number of seconds.
            num_proposals: number of proposals (N).
            num_sampling_steps: number of DDIM steps (S).
            chunk_length_s: a longer video is searched in overlapping windows of this many seconds, see `windows`.
                Default: as many clips as the model reads, `max_clips`. If this is at least the duration, a video of
                more clips is averaged down to `max_clips` instead.
            stride_length_s: the part at each side of such a window whose moments are left to the neighboring window.
                Default: a quarter of `chunk_length_s`.
            max_download_bytes: maximum size of a video that is downloaded. Default: 1 GiB.
            max_video_seconds: maximum duration of a video. Default: one day.
            progress: show a progress bar while the video is downloaded, encoded and searched.
            return_saliency: also return the saliency score of each clip.

        Returns:
            For one sentence, a list of `{"start", "end", "score"}` in descending order of score, with times in seconds.
            With `return_saliency`, `{"moments": [...], "saliency": [one score per clip], "clip_seconds": float}`. For a
            list of sentences, a list of these. For a list or tuple of videos, a list of results. For any other
            iterable, an iterator over the results, in the same order.

        Raises:
            FileNotFoundError: if a video file does not exist.
            OSError: if a download fails.
            ValueError: if the input is not a readable video or not a sentence, or if an option is invalid. The message
                names the input or the option. Options are checked first.
        """
        check_batch_size(batch_size)
        inputs: Any
        if _is_one(video):
            if query is None and not isinstance(video, Mapping):
                raise ValueError("`query` is missing: pass a sentence or a list of sentences")
            inputs = _as_row(video, query)
        elif isinstance(video, (list, tuple)):
            if not video:
                return []
            inputs = [_as_row(one, query) for one in video]
        elif isinstance(video, Dataset) and hasattr(video, "__len__"):
            inputs = Rows(video, query)
        elif isinstance(video, Iterable):
            # A generator is the only kind of iterator that `Pipeline` accepts
            inputs = (_as_row(one, query) for one in video)
        else:
            inputs = _as_row(video, query)  # which `preprocess` or `open_video` rejects
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, **kwargs):
        """Check the options of a call, or those for all calls, before the work. Sort them by method."""
        known = dict.fromkeys((*PREPROCESS_OPTIONS, *FORWARD_OPTIONS, *POSTPROCESS_OPTIONS))
        unknown = kwargs.keys() - known
        if unknown:
            raise ValueError(f"unknown arguments {sorted(unknown)}; expected some of {[*known]}")
        check_batch_size(self._batch_size)
        check_post_processing(**{name: kwargs[name] for name in POST_PROCESSING if name in kwargs})
        if kwargs.get("num_proposals") is not None:
            check_whole(kwargs["num_proposals"], "`num_proposals`", 1)
        if kwargs.get("num_sampling_steps") is not None:
            check_num_sampling_steps(kwargs["num_sampling_steps"], self.model.config.num_diffusion_steps)
        if "max_download_bytes" in kwargs:
            check_whole(kwargs["max_download_bytes"], "`max_download_bytes`", 1)
        if "max_video_seconds" in kwargs:
            check_positive(kwargs["max_video_seconds"], "`max_video_seconds`")
        if hasattr(self, "backbones"):
            self._check_chunks({**self._forward_params, **kwargs})
        return tuple(
            {name: kwargs[name] for name in names if name in kwargs}
            for names in (PREPROCESS_OPTIONS, FORWARD_OPTIONS, POSTPROCESS_OPTIONS)
        )

    def _check_chunks(self, options: Mapping[str, Any]) -> None:
        """Check the length and the stride of the windows together: each may be given here or for all calls."""
        lengths = options.get("chunk_length_s"), options.get("stride_length_s")
        check_chunks(*lengths, self.backbones.clip_seconds, self.processor.max_clips)

    def encode(
        self, video: Any, *, progress: bool = False, advance: Callable[[float], None] | None = None, **limits
    ) -> EncodedVideo:
        """
        Decode and encode a video, to search it several times.

        Args:
            video: whatever a call takes as one video.
            progress: show a progress bar while the video is downloaded and encoded.
            advance: called after each batch with its share of the work. The shares sum to 1.
            limits: `max_download_bytes` and `max_video_seconds`, as in a call, for a video that is not open yet.

        Raises:
            FileNotFoundError, OSError, ValueError: as in a call.
        """
        allowed = [name for name in PREPROCESS_OPTIONS if name != "progress"]
        if unknown := limits.keys() - set(allowed):
            raise ValueError(f"unknown arguments {sorted(unknown)}; expected some of {allowed}")
        options, _, _ = self._sanitize_parameters(**limits, progress=progress)
        video = self._open(video, **{**self._preprocess_params, **options})
        return video if isinstance(video, EncodedVideo) else self._encode(video, progress, advance)

    def _encode(self, video: Video, progress: bool, advance: Callable[[float], None] | None = None) -> EncodedVideo:
        features = self.backbones.encode_video(video, progress=progress, advance=advance)
        return EncodedVideo(video.duration, video.clip_seconds, features, self._backbone_ids())

    def _open(self, video: Any, **options) -> Video | EncodedVideo:
        """Open one video, or check one that was opened or encoded before, perhaps for another model."""
        if not isinstance(video, (Video, EncodedVideo)):
            return open_video(video, self.backbones.clip_seconds, **options)
        if video.clip_seconds != self.backbones.clip_seconds:
            name = video.name if isinstance(video, Video) else "the encoded video"
            raise ValueError(
                f"{name}: clips of {video.clip_seconds:g} s; the backbones read {self.backbones.clip_seconds:g} s"
            )
        for made_by, own in zip(getattr(video, "backbone_ids", ()), self._backbone_ids()):
            if made_by and own and made_by != own:
                raise ValueError(f"the encoded video: made by the backbone {made_by}; this model's is {own}")
        return video

    def _backbone_ids(self) -> list[str | None]:
        """Return the Hub id of each video backbone, or `None` for one that is in a folder."""
        return [entry.get("id") for entry in self.backbones.descriptions if "feature_size" in entry]

    def preprocess(  # type: ignore[override]
        self, inputs: Mapping[str, Any], **options
    ) -> dict[str, Any]:
        """
        Check the sentences and open the video, which downloads it if it is a URL. Frames are decoded later, while
        `_forward` encodes them.
        """
        if not isinstance(inputs, Mapping) or not {"video", "query"} <= inputs.keys():
            raise ValueError(f"each input must be a dict with 'video' and 'query', got {reprlib.repr(inputs)}")
        query = inputs["query"]
        queries = list(query) if isinstance(query, Sequence) and not isinstance(query, (str, bytes)) else [query]
        for sentence in queries:
            check_sentence(sentence)
        video = self._open(inputs["video"], **options)
        return {"video": video, "queries": queries, "single": isinstance(query, str)}

    def _forward(  # type: ignore[override]
        self,
        inputs: dict[str, Any],
        chunk_length_s: float | None = None,
        stride_length_s: float | None = None,
        progress: bool = False,
        **options,
    ) -> dict[str, Any]:
        video, queries = inputs["video"], inputs["queries"]
        features = {"findings": [], "video": video, "single": inputs["single"]}
        if not queries:
            return features
        tokens = self.backbones.encode_text(queries, self.processor.max_tokens)
        encoded = video if isinstance(video, EncodedVideo) else self._encode(video, progress)
        texts = self.processor.pad([self.processor.prepare_text(array) for array in tokens])
        windows = self._windows(encoded, chunk_length_s, stride_length_s)
        features["findings"] = search(
            self.model, self.processor, encoded.features, *texts, windows, progress=progress, **options
        )
        return features

    def _windows(
        self, video: EncodedVideo, chunk_length_s: float | None, stride_length_s: float | None
    ) -> list[SearchWindow]:
        """Return the windows in which a video is searched."""
        if chunk_length_s is None:
            chunk = self.processor.max_clips
        elif chunk_length_s >= video.duration:
            chunk = video.num_clips
        else:
            chunk = math.floor(chunk_length_s / video.clip_seconds + 0.5)
        return plan_windows(
            video.num_clips, chunk, None if stride_length_s is None else stride_length_s / video.clip_seconds
        )

    def postprocess(  # type: ignore[override]
        self, features: dict[str, Any], return_saliency: bool = False, **options
    ) -> Any:
        """Turn what was found into moments, see `__call__`."""
        video = features["video"]
        covered = video.num_clips * video.clip_seconds
        results: list[Any] = []
        for findings in features["findings"]:
            (moments,) = self.processor.post_process_moment_retrieval(findings, [covered], [video.duration], **options)
            saliency = findings.saliency_scores[0].tolist()
            with_saliency = {"moments": moments, "saliency": saliency, "clip_seconds": covered / len(saliency)}
            results.append(with_saliency if return_saliency else moments)
        return results[0] if features["single"] else results

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Save model, processor and backbones in one folder, with the code to load it without the package."""
        self.processor.save_pretrained(save_directory)
        super().save_pretrained(save_directory, push_to_hub, backbones=self.backbones, **kwargs)


def load_processor_of(model: Any) -> DiffusionVMRProcessor:
    """Load the processor beside which a model was loaded. Raise ValueError if the model was not loaded."""
    if (origin := origin_of(model)) is None:
        raise ValueError("the model was not loaded from a checkpoint, so it has no processor; pass `processor=`")
    return DiffusionVMRProcessor.from_pretrained(origin, **model.hub_kwargs)


class Rows(Dataset):
    """A dataset of videos as rows with the same query, or a dataset of rows as it is."""

    def __init__(self, videos: Any, query: Any):
        self.videos = videos
        self.query = query

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _as_row(self.videos[index], self.query)


def _as_row(video: Any, query: Any) -> Any:
    """Return a row of video and query. Without a query, `video` must be such a row already."""
    return video if query is None else {"video": video, "query": query}


def check_batch_size(batch_size: Any) -> None:
    """Raise `ValueError` for a `batch_size` other than 1."""
    if batch_size is not None and batch_size != 1:
        raise ValueError(
            f"`batch_size` must be 1, got {batch_size!r}: videos differ in length, so each is encoded alone "
            "(pass the sentences of one video as a list, to search them in one batch)"
        )


def _is_one(video: Any) -> bool:
    """Return whether a value stands for one video or one row, valid or not."""
    if isinstance(video, tuple):  # `(frames, fps)`, unless all items are videos or rows
        return not all(_is_one(item) and not hasattr(item, "dtype") for item in video)
    is_array_or_decoder = hasattr(video, "dtype") or hasattr(video, "_hf_encoded")
    kinds = (str, bytes, os.PathLike, Mapping, Video, EncodedVideo)
    return is_array_or_decoder or hasattr(video, "read") or isinstance(video, kinds)


__all__ = ["EncodedVideo", "VideoMomentRetrievalPipeline"]
