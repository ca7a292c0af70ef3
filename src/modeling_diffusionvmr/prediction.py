"""A model over a data set -> predictions in the official format."""

from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .dataset import DiffusionVMRDataCollator, MomentRetrievalDataset

# And no draws of training, which hold the truth but for some noise
MODEL_INPUTS = ("video_features", "video_mask", "text_features", "text_mask")


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
        A dict a row: `qid, query, vid, pred_relevant_windows` (`[start, end, score]` in seconds, by falling score), and
        `pred_saliency_scores`, one a clip.
    """
    model.eval()
    collate = DiffusionVMRDataCollator()
    loader = DataLoader(dataset, batch_size, collate_fn=lambda samples: (samples, collate(samples)))
    predictions = []
    for samples, batch in tqdm(loader, desc="retrieving", disable=not progress):
        inputs = {
            name: batch[name].to(model.device, model.dtype if batch[name].is_floating_point() else None)
            for name in MODEL_INPUTS
        }
        outputs = model(**inputs, num_proposals=num_proposals, num_sampling_steps=num_sampling_steps)
        rows = [dataset.rows[sample["row"]] for sample in samples]
        moments = dataset.processor.post_process_moment_retrieval(
            outputs,
            [sample["covered_duration"] for sample in samples],
            [row["duration"] for row in rows],
            **post_processing,
        )
        saliency = outputs.saliency_scores.float().cpu()
        for row, sample, found, scores in zip(rows, samples, moments, saliency):
            predictions.append(
                {
                    "qid": row["qid"],
                    "query": row["query"],
                    "vid": row["vid"],
                    "pred_relevant_windows": [[moment["start"], moment["end"], moment["score"]] for moment in found],
                    "pred_saliency_scores": scores[: len(sample["video_features"])].tolist(),
                }
            )
    return predictions
