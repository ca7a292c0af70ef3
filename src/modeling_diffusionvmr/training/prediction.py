"""A model over a data set -> predictions in the official format."""

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.annotations import SALIENCY_CLIP_SECONDS
from .collator import DiffusionVMRDataCollator
from .dataset import MomentRetrievalDataset

# And no draws of training, which hold the truth but for some noise
MODEL_INPUTS = ("video_features", "video_mask", "text_features", "text_mask")


class RowOutputs(NamedTuple):
    """
    What the model says of B rows of a data set, in shapes that do not depend on the batch, so that what several
    batches or processes say can be put together: `rows` (B,), their indices; `covered_durations` (B,), seconds;
    `num_clips` (B,); `logits` (B, N, 2); `pred_spans` (B, N, 2); `saliency_scores` (B, max_clips).
    """

    rows: Tensor
    covered_durations: Tensor
    num_clips: Tensor
    logits: Tensor
    pred_spans: Tensor
    saliency_scores: Tensor


def row_outputs(outputs, batch: dict[str, Any], max_clips: int) -> RowOutputs:
    """The model's output of a batch that was collated `with_rows`."""
    saliency = outputs.saliency_scores.float()
    return RowOutputs(
        batch["rows"],
        batch["covered_durations"],
        batch["video_mask"].sum(1),
        outputs.logits.float(),
        outputs.pred_spans.float(),
        nn.functional.pad(saliency, (0, max_clips - saliency.shape[1])),
    )


def official_predictions(
    dataset: MomentRetrievalDataset, outputs: RowOutputs, **post_processing
) -> list[dict[str, Any]]:
    """
    Outputs of rows, in any order -> a dict a row: `qid, query, vid, pred_relevant_windows` (`[start, end, score]` in
    seconds, by falling score), and `pred_saliency_scores`, one a clip; of rows with annotators' scores one for each of
    their clips. `post_processing` overrides the processor's.
    """
    rows = [dataset.rows[index] for index in outputs.rows.tolist()]
    found = dataset.processor.post_process_moment_retrieval(
        SimpleNamespace(logits=outputs.logits, pred_spans=outputs.pred_spans),
        outputs.covered_durations.tolist(),
        [row["duration"] for row in rows],
        **post_processing,
    )
    saliency, lengths = outputs.saliency_scores.tolist(), outputs.num_clips.tolist()
    return [
        {
            "qid": row["qid"],
            "query": row["query"],
            "vid": row["vid"],
            "pred_relevant_windows": [[moment["start"], moment["end"], moment["score"]] for moment in moments],
            "pred_saliency_scores": _on_official_clips(scores[:length], covered, row),
        }
        for row, moments, scores, length, covered in zip(
            rows, found, saliency, lengths, outputs.covered_durations.tolist()
        )
    ]


def _on_official_clips(scores: list[float], covered_duration: float, row: dict[str, Any]) -> list[float]:
    # Where annotators gave scores, theirs are of 2 s clips, and so the predicted ones have to be
    seconds = covered_duration / len(scores)
    if not row.get("saliency_scores") or math.isclose(seconds, SALIENCY_CLIP_SECONDS, rel_tol=0.01):
        return scores
    centers = (
        index * SALIENCY_CLIP_SECONDS + SALIENCY_CLIP_SECONDS / 2
        for index in range(int(row["duration"] / SALIENCY_CLIP_SECONDS))
    )
    return [scores[min(int(center / seconds), len(scores) - 1)] for center in centers]


@torch.inference_mode()
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
    Retrieves the moments of every row.

    Args:
        model: a `DiffusionVMRForMomentRetrieval`; it is put in eval mode and left there.
        dataset: its labels and draws, if it has any, are not used.
        batch_size: rows at once.
        num_proposals, num_sampling_steps: N and S, by default the model's.
        progress: whether to show a bar.
        post_processing: `threshold`, `top_k`, `nms_threshold`, `round_to`, which override the processor's.

    Returns:
        What `official_predictions` does, in the order of the rows.
    """
    model.eval()
    loader = DataLoader(dataset, batch_size, collate_fn=DiffusionVMRDataCollator(with_rows=True))
    predictions = []
    for batch in tqdm(loader, desc="retrieving", disable=not progress):
        inputs = {
            name: batch[name].to(model.device, model.dtype if batch[name].is_floating_point() else None)
            for name in MODEL_INPUTS
        }
        outputs = model(**inputs, num_proposals=num_proposals, num_sampling_steps=num_sampling_steps)
        outputs = row_outputs(outputs, batch, dataset.processor.max_clips)
        predictions += official_predictions(dataset, outputs, **post_processing)
    return predictions
