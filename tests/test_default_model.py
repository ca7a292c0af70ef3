"""The embedded checkpoint: the claims of docs/explanation/embedded_model.md, on a small sample."""

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

from modeling_diffusionvmr import (
    DEFAULT_MODEL,
    DiffusionVMRConfig,
    DiffusionVMRForMomentRetrieval,
    DiffusionVMRProcessor,
    evaluate_predictions,
)
from modeling_diffusionvmr.modeling_diffusionvmr import TASK
from modeling_diffusionvmr.synthetic.rendered_world import (
    VideoPlan,
    absent_queries,
    annotation_rows,
    plan_video,
    write_video,
)
from modeling_diffusionvmr.training.prediction import every_proposal

FIRST_SEED = 55_000_000  # used neither in training nor for the published figures
NUM_VIDEOS = 12


@pytest.fixture(scope="module")
def retrieve():
    return pipeline(TASK, model=DEFAULT_MODEL)


@pytest.fixture(scope="module")
def retrieve_all():
    """The pipeline, returning every proposal, as the official metrics need."""
    retrieve = pipeline(TASK, model=DEFAULT_MODEL)
    retrieve.processor = every_proposal(retrieve.processor)
    return retrieve


@pytest.fixture(scope="module")
def make_videos(tmp_path_factory):
    """Return a function that renders videos, once. It returns the plan and the file of each."""

    @cache
    def make(unseen_pairs: bool) -> list[tuple[VideoPlan, Path]]:
        folder = tmp_path_factory.mktemp("videos")
        plans = [plan_video(seed, unseen_pairs) for seed in range(FIRST_SEED, FIRST_SEED + NUM_VIDEOS)]
        for plan in plans:
            write_video(plan, folder / f"{plan.vid}.mp4")
        return [(plan, folder / f"{plan.vid}.mp4") for plan in plans]

    return make


def test_size():
    files = [path for path in Path(DEFAULT_MODEL).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * 10**6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]


def test_contains_only_weights_and_json():
    suffixes = {path.suffix for path in Path(DEFAULT_MODEL).rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}
    assert not [path for path in Path(DEFAULT_MODEL).rglob("*") if path.is_symlink()]


def test_auto_classes():
    assert isinstance(AutoConfig.from_pretrained(DEFAULT_MODEL), DiffusionVMRConfig)
    assert isinstance(AutoProcessor.from_pretrained(DEFAULT_MODEL), DiffusionVMRProcessor)
    model = AutoModel.from_pretrained(DEFAULT_MODEL)
    assert isinstance(model, DiffusionVMRForMomentRetrieval)
    assert model.dtype == torch.float32  # stored as float16
    assert pipeline(TASK, model=DEFAULT_MODEL).backbones.models[0].model.dtype == torch.float32


@pytest.mark.parametrize("unseen_pairs", [False, True])
def test_it_retrieves(retrieve_all, make_videos, unseen_pairs):
    rows, predictions = [], []
    for plan, path in make_videos(unseen_pairs):
        of_video = annotation_rows(plan)
        for row, moments in zip(of_video, retrieve_all(path, [row["query"] for row in of_video])):
            windows = [[moment["start"], moment["end"], moment["score"]] for moment in moments]
            predictions.append({**row, "pred_relevant_windows": windows})
        rows += of_video
    # About 50 sentences per side, so the bars are well below the README's figures
    assert evaluate_predictions(predictions, rows)["brief"]["MR-full-R1@0.5"] >= 65


def test_moments_by_default(retrieve, make_videos):
    """A few distinct moments for a sentence, and seldom one for a sentence that is not in the video."""
    present, absent = [], []
    for seed, (plan, path) in enumerate(make_videos(False), FIRST_SEED):
        queries = [*plan.queries, *absent_queries(plan, seed, seed % 2 == 0)]
        found = retrieve(path, [query.text for query in queries])
        present += found[: len(plan.queries)]
        absent += found[len(plan.queries) :]
    assert max(map(len, present)) <= 5 and sum(map(len, present)) < 2.5 * len(present)
    assert sum(map(bool, present)) > 0.8 * len(present)
    assert sum(map(bool, absent)) < 0.45 * len(absent)


def test_saliency_ranks_the_clips(retrieve, make_videos):
    plan, path = make_videos(False)[0]
    query = plan.queries[0]
    result = retrieve(path, query.text, return_saliency=True)
    centers = (torch.arange(len(result["saliency"])) + 0.5) * result["clip_seconds"]
    inside = torch.zeros(len(centers), dtype=torch.bool)
    for start, end in query.windows:
        inside |= (start <= centers) & (centers < end)
    scores = torch.tensor(result["saliency"])
    assert (scores[inside][:, None] > scores[~inside]).float().mean() > 0.8


def test_more_proposals_and_steps(retrieve_all, make_videos):
    plan, path = make_videos(False)[0]
    query = plan.queries[0].text
    few = retrieve_all(path, query, num_proposals=3)
    many = retrieve_all(path, query, num_proposals=50, num_sampling_steps=4)
    assert len(few) == 3 and len(many) == 50
