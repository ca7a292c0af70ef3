"""Run a model over a dataset and write predictions in the official format."""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.annotations import SALIENCY_CLIP_SECONDS
from ..processing_diffusionvmr import DiffusionVMRProcessor, check_outputs
from ..windows import merge
from .collator import DiffusionVMRDataCollator
from .dataset import MomentRetrievalDataset

# The noisy spans of a training sample are excluded, since they reveal the truth
MODEL_INPUTS = ("video_features", "video_mask", "text_features", "text_mask")

EVERY_PROPOSAL = {"threshold": 0.0, "top_k": None, "nms_threshold": None}


def every_proposal(processor: DiffusionVMRProcessor) -> DiffusionVMRProcessor:
    """
    Return a copy of a processor that by default drops no proposal. The official metrics rank every proposal, while the
    values saved with a checkpoint are chosen for people. `round_to` stays.
    """
    processor = copy.copy(processor)
    vars(processor).update(EVERY_PROPOSAL)
    return processor


class SampleOutputs(NamedTuple):
    """
    The model's outputs for B samples of a dataset.

    `indices` (B,) in the dataset; `covered_durations` (B,), seconds; `num_clips` (B,); `logits` (B, N, 2); `pred_spans`
    (B, N, 2); `saliency_scores` (B, max_clips). No shape but B depends on the batch, so that the outputs of several
    batches or processes can be concatenated.
    """

    indices: Tensor
    covered_durations: Tensor
    num_clips: Tensor
    logits: Tensor
    pred_spans: Tensor
    saliency_scores: Tensor


def sample_outputs(outputs, batch: dict[str, Any], max_clips: int) -> SampleOutputs:
    """Return the `SampleOutputs` of a model's output for a batch that was collated `with_indices`."""
    saliency = outputs.saliency_scores.float()
    return SampleOutputs(
        batch["indices"],
        batch["covered_durations"],
        batch["video_mask"].sum(1),
        outputs.logits.float(),
        outputs.pred_spans.float(),
        nn.functional.pad(saliency, (0, max_clips - saliency.shape[1])),
    )


def official_predictions(
    dataset: MomentRetrievalDataset, outputs: SampleOutputs, **post_processing
) -> list[dict[str, Any]]:
    """
    Turn outputs of samples, in any order, into predictions in the official format, one dict per row.

    Each has `qid`, `query`, `vid`, `pred_relevant_windows` ([[start, end, score], ...] in seconds, in descending order
    of score) and `pred_saliency_scores`: one per clip of the features or, for a row with annotators' scores, one per
    2 s clip.

    Args:
        dataset: the dataset that the samples are from.
        outputs: of some or all of its samples; all of a row's, if there are several.
        post_processing: `threshold`, `top_k` and `nms_threshold`, by default those of `EVERY_PROPOSAL`, and `round_to`,
            by default the processor's.
    """
    if dataset.windows is not None:
        return _merged_predictions(dataset, outputs, post_processing)
    rows = [dataset.rows[index] for index in outputs.indices.tolist()]
    found = every_proposal(dataset.processor).post_process_moment_retrieval(
        outputs,
        outputs.covered_durations.tolist(),
        [row["duration"] for row in rows],
        **post_processing,
    )
    saliency, lengths = outputs.saliency_scores.tolist(), outputs.num_clips.tolist()
    return [
        _official_prediction(row, moments, scores[:length], covered)
        for row, moments, scores, length, covered in zip(
            rows, found, saliency, lengths, outputs.covered_durations.tolist()
        )
    ]


def _merged_predictions(
    dataset: MomentRetrievalDataset, outputs: SampleOutputs, post_processing: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return `official_predictions` for a dataset in which each search window of a row is a sample."""
    assert dataset.windows is not None
    check_outputs(outputs)
    processor = every_proposal(dataset.processor)
    places_of: dict[int, list[int]] = {}  # in `outputs`, of the samples of each row
    for place, index in enumerate(outputs.indices.tolist()):
        places_of.setdefault(dataset.samples[index][0], []).append(place)
    predictions = []
    for row_index, places in places_of.items():
        row = dataset.rows[row_index]
        places.sort(key=lambda place: int(outputs.indices[place]))
        windows = dataset.windows[row["vid"]]
        fields = outputs.logits[places], outputs.pred_spans[places], outputs.saliency_scores[places]
        findings = merge(windows, *fields, processor.max_clips)
        covered = dataset.covered_duration(row, windows[-1].last)
        (moments,) = processor.post_process_moment_retrieval(findings, [covered], [row["duration"]], **post_processing)
        predictions.append(_official_prediction(row, moments, findings.saliency_scores[0].tolist(), covered))
    return predictions


def _official_prediction(
    row: dict[str, Any], moments: Sequence[dict[str, float]], scores: list[float], covered_duration: float
) -> dict[str, Any]:
    return {
        "qid": row["qid"],
        "query": row["query"],
        "vid": row["vid"],
        "pred_relevant_windows": [[moment["start"], moment["end"], moment["score"]] for moment in moments],
        "pred_saliency_scores": _on_official_clips(scores, covered_duration, row),
    }


def _on_official_clips(scores: list[float], covered_duration: float, row: dict[str, Any]) -> list[float]:
    # Annotators scored 2 s clips, and the official evaluation compares clip by clip
    seconds = covered_duration / len(scores)
    if not row.get("saliency_scores") or math.isclose(seconds, SALIENCY_CLIP_SECONDS, rel_tol=0.01):
        return scores
    centers = (
        index * SALIENCY_CLIP_SECONDS + SALIENCY_CLIP_SECONDS / 2
        for index in range(int(row["duration"] / SALIENCY_CLIP_SECONDS))
    )
    return [scores[min(int(center / seconds), len(scores) - 1)] for center in centers]


def predict_moments(
    model,
    dataset: MomentRetrievalDataset,
    batch_size: int = 100,
    num_proposals: int | None = None,
    num_sampling_steps: int | None = None,
    progress: bool = True,
    **post_processing,
) -> list[dict[str, Any]]:
    """
    Retrieve moments for every row of a dataset.

    Args:
        model: a `DiffusionVMRForMomentRetrieval`; it is switched to eval mode and left there.
        dataset: the rows. Labels and noisy spans are ignored.
        batch_size: samples per batch.
        num_proposals, num_sampling_steps: N and S. Default: those of the model's configuration.
        progress: show a progress bar.
        post_processing: `threshold`, `top_k`, `nms_threshold` and `round_to`, as for `official_predictions`. By default
            every proposal is returned, whatever is saved with the processor.

    Returns:
        Predictions as from `official_predictions`, in the order of the rows. `metrics.scorable` selects those that
        `evaluate_predictions` can score.
    """
    setting = (num_proposals, num_sampling_steps)
    return predict_for_settings(model, dataset, [setting], batch_size, progress, **post_processing)[0]


@torch.inference_mode()
def predict_for_settings(
    model,
    dataset: MomentRetrievalDataset,
    settings: Sequence[tuple[int | None, int | None]],
    batch_size: int = 100,
    progress: bool = True,
    **post_processing,
) -> list[list[dict[str, Any]]]:
    """
    Retrieve moments for every row of a dataset, with several values of N and S. Every sample is encoded once.

    Args:
        model, dataset, batch_size, progress, post_processing: as for `predict_moments`.
        settings: pairs of N and S. `None` is the value of the model's configuration.

    Returns:
        For each setting, the predictions of `predict_moments`.
    """
    model.eval()
    loader = DataLoader(dataset, batch_size, collate_fn=DiffusionVMRDataCollator(with_indices=True))
    parts: list[list[SampleOutputs]] = [[] for _ in settings]
    for batch in tqdm(loader, desc="retrieving", disable=not progress):
        inputs = {
            name: batch[name].to(model.device, model.dtype if batch[name].is_floating_point() else None)
            for name in MODEL_INPUTS
        }
        memory = model.model.encode(**inputs)
        for setting, own in zip(settings, parts):
            outputs = sample_outputs(model.retrieve(memory, *setting), batch, dataset.processor.max_clips)
            own.append(SampleOutputs(*(field.cpu() for field in outputs)))
    # All batches at once, since windows of one video may lie in several
    return [
        official_predictions(dataset, SampleOutputs(*map(torch.cat, zip(*own))), **post_processing) if own else []
        for own in parts
    ]
