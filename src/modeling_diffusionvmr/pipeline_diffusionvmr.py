"""`pipeline("video-moment-retrieval")`: a video and sentences in, moments out."""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import Pipeline

from .backbones import Backbones, load_backbones
from .video import open_video

FORWARD_PARAMETERS = ("num_proposals", "num_sampling_steps", "progress")
POST_PARAMETERS = ("top_k", "threshold", "nms_threshold", "round_to", "return_saliency")


class VideoMomentRetrievalPipeline(Pipeline):
    """
    Retrieves the moments of a video that sentences describe.

    Args:
        backbones: the frozen backbones; by default those of the checkpoint, loaded from a folder inside it or from the
            Hub, on the pipeline's device and in its type.
        args, kwargs: `Pipeline`'s; the arguments of a call may be given here for all calls.

    Raises:
        ValueError: for a checkpoint whose backbones cannot be run, which it names.
    """

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, backbones: Backbones | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.model.eval()
        if backbones is None:
            config = self.model.config
            commit = getattr(config, "_commit_hash", None)
            hub_kwargs = {} if commit is None else {"revision": commit}
            backbones = load_backbones(config, config.name_or_path or None, **hub_kwargs)
        self.backbones = backbones.to(self.device, self.model.dtype)

    def __call__(self, video: Any, query: str | list[str] | None = None, **kwargs) -> Any:
        """
        Args:
            video: a path, a binary file object, or `(frames (T, H, W, 3) uint8 RGB, fps)`. For many videos, a list (or
                another iterable) of `{"video": ..., "query": ...}`, with no `query`.
            query: a sentence, or a list of sentences, for which the video is decoded and encoded once.
            top_k: the most moments of a query.
            threshold: the least score of a moment.
            nms_threshold: a moment is dropped whose IoU with a better one is above it.
            round_to: starts and ends are rounded to multiples of so many seconds.
            num_proposals, num_sampling_steps: N and S.
            progress: whether to show a bar while the video is encoded.
            return_saliency: whether to return the scores of clips too.

        Returns:
            For a sentence, a list of `{"start", "end", "score"}` in seconds by falling score; with `return_saliency`,
            `{"moments": [...], "saliency": [one a clip], "clip_seconds": float}`. For a list of sentences a list of
            these, and for many videos a list of either.

        Raises:
            FileNotFoundError, ValueError: for what is no video, or no sentence; it names what is wrong.
        """
        if query is not None:
            if isinstance(video, (list, Mapping)):
                raise ValueError('many videos are given as a list of {"video": ..., "query": ...}, without a `query`')
            return super().__call__({"video": video, "query": query}, **kwargs)
        if isinstance(video, (str, bytes, os.PathLike, tuple)):
            raise ValueError("`query` is missing: a sentence, or a list of sentences, is needed to search the video")
        if isinstance(video, list) and not video:
            return []
        return super().__call__(video, **kwargs)

    def _sanitize_parameters(self, **kwargs):
        unknown = kwargs.keys() - {*FORWARD_PARAMETERS, *POST_PARAMETERS}
        if unknown:
            raise ValueError(
                f"unknown arguments {sorted(unknown)}; known are {[*FORWARD_PARAMETERS, *POST_PARAMETERS]}"
            )
        return (
            {},
            {name: kwargs[name] for name in FORWARD_PARAMETERS if name in kwargs},
            {name: kwargs[name] for name in POST_PARAMETERS if name in kwargs},
        )

    def preprocess(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Opens the video and checks the sentences; frames are decoded only as `_forward` encodes them."""
        if not isinstance(inputs, Mapping) or inputs.keys() != {"video", "query"}:
            raise ValueError(f"each input must be a dict of 'video' and 'query', got {inputs!r}")
        query = inputs["query"]
        queries = list(query) if isinstance(query, Sequence) and not isinstance(query, str) else [query]
        for sentence in queries:
            if not isinstance(sentence, str) or not sentence.strip():
                raise ValueError(f"a query must be a sentence, got {sentence!r}")
        video = open_video(inputs["video"], self.backbones.clip_seconds)
        if video.num_clips > self.processor.max_clips:
            warnings.warn(
                f"the video of {video.duration:.1f} s has {video.num_clips} clips; they are averaged down to "
                f"{self.processor.max_clips}, so its moments are found less exactly",
                stacklevel=2,
            )
        return {"video": video, "queries": queries, "single": isinstance(query, str)}

    def _forward(self, inputs: dict[str, Any], progress: bool = False, **parameters) -> dict[str, Any]:
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

    def postprocess(self, features: dict[str, Any], return_saliency: bool = False, **parameters) -> Any:
        """The model's output -> moments, see `__call__`."""
        outputs, video = features["outputs"], features["video"]
        if outputs is None:
            return []
        count = len(outputs.logits)
        covered = video.num_clips * video.clip_seconds
        results = self.processor.post_process_moment_retrieval(
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

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Writes model, processor and backbones into one folder, with the code to load it without the package."""
        os.makedirs(save_directory, exist_ok=True)
        config = self.model.config
        loaded_from, config.backbones = config.backbones, self.backbones.save_pretrained(save_directory)
        try:
            self.processor.save_pretrained(save_directory)
            super().save_pretrained(save_directory, **kwargs)
        finally:
            config.backbones = loaded_from


__all__ = ["VideoMomentRetrievalPipeline"]
