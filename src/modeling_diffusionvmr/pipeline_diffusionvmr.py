"""`pipeline("video-moment-retrieval")`: find moments in a video from sentences."""

import os
import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import Pipeline

from .backbones import Backbones
from .checkpoint import load_backbones
from .checks import check_sentence
from .configuration_diffusionvmr import DiffusionVMRConfig
from .hub import PushToHub
from .processing_diffusionvmr import DiffusionVMRProcessor
from .video import open_video
from .weights import check_weights

FORWARD_PARAMETERS = ("num_proposals", "num_sampling_steps", "progress")
POST_PARAMETERS = ("top_k", "threshold", "nms_threshold", "round_to", "return_saliency")


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
    _load_processor = True  # type: ignore[assignment]  # `Pipeline` declares these five as None, and reads booleans
    _load_image_processor = False  # type: ignore[assignment]
    _load_video_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]

    def __init__(self, *args, backbones: Backbones | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        model, config = self.model.eval(), self.model.config
        if config.model_type != DiffusionVMRConfig.model_type:
            raise ValueError(f"{config.name_or_path}: a model of type {config.model_type}, not DiffusionVMR")
        check_weights(model, model.missing_weights, config.name_or_path or "the model")
        if backbones is None:
            backbones = load_backbones(
                config, config.name_or_path or None, sources=model.backbone_sources, **model.hub_kwargs
            )
        self.backbones = backbones.to(self.device, self.model.dtype)

    # Here and below, `Pipeline` uses other names for the same arguments, but always passes them by position
    def __call__(  # type: ignore[override]
        self, video: Any, query: str | list[str] | None = None, **kwargs
    ) -> Any:
        """
        Args:
            video: a path, a binary file object, or `(frames, fps)` with frames (T, H, W, 3) uint8 RGB. For many videos,
                an iterable of `{"video": ..., "query": ...}` (a list, a generator, a `datasets.Dataset`), and no
                `query`.
            query: a sentence or a list of sentences. The video is decoded and encoded once for all of them.
            top_k: maximum number of moments per query.
            threshold: minimum score of a moment.
            nms_threshold: a moment is dropped if its IoU with a better one is above this value.
            round_to: round starts and ends to multiples of this number of seconds.
            num_proposals: number of proposals (N).
            num_sampling_steps: number of DDIM steps (S).
            progress: show a progress bar while the video is encoded.
            return_saliency: also return the saliency score of each clip.

        Returns:
            For one sentence, a list of `{"start", "end", "score"}` in descending order of score, with times in seconds.
            With `return_saliency`, `{"moments": [...], "saliency": [one score per clip], "clip_seconds": float}`. For a
            list of sentences, a list of these. For a list or tuple of videos, a list of results. For any other
            iterable, an iterator over the results, in the same order.

        Raises:
            FileNotFoundError: if a video file does not exist.
            TypeError, ValueError: if the input is not a readable video or not a sentence. The message names the input.
        """
        if query is not None:
            return super().__call__({"video": video, "query": query}, **kwargs)
        if isinstance(video, tuple) and all(isinstance(row, Mapping) for row in video):
            video = list(video)
        if _is_single_video(video):
            raise ValueError("`query` is missing: pass a sentence or a list of sentences")
        if isinstance(video, list) and not video:
            return []
        if isinstance(video, Iterable) and not isinstance(video, (list, Mapping, torch.utils.data.Dataset)):
            video = (row for row in video)  # a generator, the only kind of iterator that `Pipeline` accepts
        return super().__call__(video, **kwargs)

    def _sanitize_parameters(self, **kwargs):
        unknown = kwargs.keys() - {*FORWARD_PARAMETERS, *POST_PARAMETERS}
        if unknown:
            raise ValueError(
                f"unknown arguments {sorted(unknown)}; expected some of {[*FORWARD_PARAMETERS, *POST_PARAMETERS]}"
            )
        return (
            {},
            {name: kwargs[name] for name in FORWARD_PARAMETERS if name in kwargs},
            {name: kwargs[name] for name in POST_PARAMETERS if name in kwargs},
        )

    def preprocess(self, inputs: Mapping[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """Open the video and check the sentences. Frames are decoded later, while `_forward` encodes them."""
        if not isinstance(inputs, Mapping) or inputs.keys() != {"video", "query"}:
            raise ValueError(f"each input must be a dict with 'video' and 'query', got {reprlib.repr(inputs)}")
        query = inputs["query"]
        queries = list(query) if isinstance(query, Sequence) and not isinstance(query, (str, bytes)) else [query]
        for sentence in queries:
            check_sentence(sentence)
        video = open_video(inputs["video"], self.backbones.clip_seconds)
        if video.num_clips > self.processor.max_clips:
            warnings.warn(
                f"the {video.num_clips} clips of this video of {video.duration:.1f} s are averaged down to "
                f"{self.processor.max_clips}, which makes its moments less precise",
                stacklevel=2,
            )
        return {"video": video, "queries": queries, "single": isinstance(query, str)}

    def _forward(  # type: ignore[override]
        self, inputs: dict[str, Any], progress: bool = False, **parameters
    ) -> dict[str, Any]:
        video, queries = inputs["video"], inputs["queries"]
        features = {"outputs": None, "video": video, "single": inputs["single"]}
        if not queries:
            return features
        tokens = self.backbones.encode_text(queries, self.processor.max_tokens)
        frames = tqdm(video, desc="encoding clips", total=video.num_clips, disable=not progress)
        arrays = self.backbones.encode_video(frames)
        texts, text_mask = self.processor.pad([self.processor.prepare_text(array) for array in tokens])
        clips = self.processor.prepare_video(arrays)
        device, dtype = self.device, self.model.dtype
        features["outputs"] = self.model(
            video_features=clips.to(device, dtype).expand(len(texts), -1, -1),
            text_features=texts.to(device, dtype),
            text_mask=text_mask.to(device),
            **parameters,
        )
        return features

    def postprocess(  # type: ignore[override]
        self, features: dict[str, Any], return_saliency: bool = False, **parameters
    ) -> Any:
        """Turn the model's outputs into moments, see `__call__`."""
        outputs, video = features["outputs"], features["video"]
        if outputs is None:
            return []
        count = len(outputs.logits)
        covered = video.num_clips * video.clip_seconds
        results: list[Any] = self.processor.post_process_moment_retrieval(
            outputs, [covered] * count, [video.duration] * count, **parameters
        )
        if return_saliency:
            saliency = outputs.saliency_scores.float().tolist()
            clip_seconds = covered / outputs.saliency_scores.shape[1]
            results = [
                {"moments": moments, "saliency": scores, "clip_seconds": clip_seconds}
                for moments, scores in zip(results, saliency)
            ]
        return results[0] if features["single"] else results

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Save model, processor and backbones in one folder, with the code to load it without the package."""
        self.processor.save_pretrained(save_directory)
        super().save_pretrained(save_directory, push_to_hub, backbones=self.backbones, **kwargs)


def _is_single_video(video: Any) -> bool:
    is_array = hasattr(video, "dtype")
    return is_array or hasattr(video, "read") or isinstance(video, (str, bytes, os.PathLike, tuple))


__all__ = ["VideoMomentRetrievalPipeline"]
