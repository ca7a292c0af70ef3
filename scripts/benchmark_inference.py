"""`benchmark.py --part inference`: inference and a training step on the CPU, beside Moment-DETR of the same size."""

import argparse
import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from benchmark_common import alternate, official_module
from benchmark_training import make_dataset
from modeling_diffusionvmr import (
    DiffusionVMRConfig,
    DiffusionVMRDataCollator,
    DiffusionVMRForMomentRetrieval,
    DiffusionVMRProcessor,
    OnnxDiffusionVMR,
)
from modeling_diffusionvmr.deployment.onnx_export import export_onnx, quiet
from modeling_diffusionvmr.deployment.onnx_model import default_options, import_onnxruntime
from modeling_diffusionvmr.modeling_diffusionvmr import clip_positions
from modeling_diffusionvmr.training.prediction import MODEL_INPUTS
from operator_counter import OperatorCounter

SIZES = {
    "published": {
        "d_model": 256,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 1024,
        "decoder_ffn_dim": 1024,
    },
    "widened": {},
}
"""Changes to our default configuration: the size of Moment-DETR as published, and our own, the paper's."""


class Column(NamedTuple):
    """A column of the table: which function of a contender runs on how many samples, and how often in one turn."""

    name: str
    function: str
    batch_size: int
    calls: int


COLUMNS = (
    Column("batch 1", "retrieve", 1, 10),  # too short to be timed alone
    Column("batch 32", "retrieve", 32, 1),
    Column("batch 100", "retrieve", 100, 1),
    Column("training step, batch 32", "train", 32, 1),
)
NUM_TOKENS = 32
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 1e-4, 0.1  # of Moment-DETR
MATRIX_SIZE = 2048  # of the multiplication that measures the machine

OURS, OFFICIAL = "ours", "Moment-DETR"
BFLOAT16, ONNX = "bfloat16", "ONNX Runtime"
VARIANTS = {"bfloat16": BFLOAT16, "onnx": ONNX}
"""The choices of `--variants`, and how the table names them."""

Batch = dict[str, Any]


class Contender(NamedTuple):
    """A model to measure. The functions take a batch from `make_batch`."""

    name: str
    module: nn.Module
    retrieve: Callable[[Batch], Any]
    train: Callable[[Batch], Any] | None = None  # forward, loss, backward, clipping and optimizer
    fixed_batch: bool = False  # can only retrieve one query


def contender(
    name: str,
    model: nn.Module,
    inputs: Callable[[Batch], dict[str, Tensor]],
    loss: Callable[[Batch], Tensor],
    fused: bool = False,
) -> Contender:
    """
    Return a contender for a model, given the arguments of its `forward`, its loss for a batch, and whether its trainer
    uses the fused AdamW.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=fused)

    @torch.inference_mode()
    def retrieve(batch: Batch) -> None:
        if model.training:
            model.eval()
        model(**inputs(batch))

    def train(batch: Batch) -> None:
        if not model.training:
            model.train()
        optimizer.zero_grad()
        loss(batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()

    return Contender(name, model, retrieve, train)


def our_contender(name: str, config: DiffusionVMRConfig) -> Contender:
    """Return DiffusionVMR with random weights."""
    model = DiffusionVMRForMomentRetrieval(config)
    return contender(
        name,
        model,
        lambda batch: {field: batch["ours"][field] for field in MODEL_INPUTS},
        lambda batch: model(**batch["ours"]).loss,
        fused=True,
    )


def official_contender(name: str, config: DiffusionVMRConfig, checkout: str) -> Contender:
    """Return Moment-DETR from a checkout of its repository, with random weights and the sizes of a configuration."""
    model, criterion = official_module(checkout, "moment_detr.model").build_model(official_options(config))

    def loss(batch: Batch) -> Tensor:
        losses, weights = criterion(model(**batch["theirs"]), batch["targets"]), criterion.weight_dict
        return sum(losses[term] * weights[term] for term in losses if term in weights)

    return contender(name, model, lambda batch: batch["theirs"], loss)


def official_options(config: DiffusionVMRConfig) -> argparse.Namespace:
    """Return the options of Moment-DETR: its defaults, except for the sizes."""
    return argparse.Namespace(
        device="cpu",
        hidden_dim=config.d_model,
        enc_layers=config.encoder_layers,
        dec_layers=config.decoder_layers,
        nheads=config.encoder_attention_heads,
        dim_feedforward=config.encoder_ffn_dim,
        t_feat_dim=config.text_feature_size,
        v_feat_dim=config.video_feature_size + 2,  # with start and end of each clip
        max_q_l=config.max_tokens,
        max_v_l=config.max_clips,
        num_queries=10,
        dropout=0.1,
        input_dropout=0.5,
        pre_norm=False,
        n_input_proj=2,
        position_embedding="sine",
        use_txt_pos=False,
        aux_loss=True,
        contrastive_align_loss=False,
        contrastive_hdim=64,
        temperature=0.07,
        span_loss_type="l1",
        set_cost_span=10,
        set_cost_giou=1,
        set_cost_class=4,
        span_loss_coef=10,
        giou_loss_coef=1,
        label_loss_coef=4,
        lw_saliency=1.0,
        saliency_margin=0.2,
        eos_coef=0.1,
    )


def bfloat16_contender(name: str, model: DiffusionVMRForMomentRetrieval) -> Contender:
    """Return a copy of DiffusionVMR that retrieves with weights in bfloat16, and is trained with autocast."""
    trained, rounded = copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16).eval()

    def loss(batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return trained(**batch["ours"]).loss

    @torch.inference_mode()
    def retrieve(batch: Batch) -> None:
        rounded(**{field: rounding(batch["ours"][field]) for field in MODEL_INPUTS})

    def rounding(value: Tensor) -> Tensor:
        return value.bfloat16() if value.is_floating_point() else value

    return contender(name, trained, lambda batch: batch["ours"], loss, fused=True)._replace(retrieve=retrieve)


def our_onnx_contender(name: str, model: DiffusionVMRForMomentRetrieval) -> Contender:
    """Return DiffusionVMR as `diffusionvmr export` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model.eval(), DiffusionVMRProcessor(), folder)
        exported = OnnxDiffusionVMR.from_pretrained(folder)

    def retrieve(batch: Batch) -> None:
        exported(**{field: batch["ours"][field] for field in MODEL_INPUTS})

    return Contender(name, model, retrieve, fixed_batch=True)


def official_onnx_contender(name: str, model: nn.Module, batch: Batch) -> Contender:
    """Return Moment-DETR as PyTorch exports it, for batches of the shape of this one."""
    with tempfile.TemporaryDirectory() as folder, quiet(), contextlib.redirect_stdout(None):
        path = Path(folder, "model.onnx")
        torch.onnx.export(model.eval(), kwargs=batch["theirs"], f=path, dynamo=True, verbose=False)
        session = import_onnxruntime().InferenceSession(path, default_options(), providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}

    def retrieve(batch: Batch) -> None:
        session.run(None, {name: value.numpy() for name, value in batch["theirs"].items() if name in names})

    return Contender(name, model, retrieve, fixed_batch=True)


def make_batch(config: DiffusionVMRConfig, size: int, seed: int) -> Batch:
    """
    Return simulated rows as a training batch: `ours` are the arguments of our model, `theirs` those of Moment-DETR for
    the same rows, with `targets` for its loss.
    """
    dataset = make_dataset(config, max(size, 2), NUM_TOKENS, seed)  # a row needs another one to draw a sentence from
    ours = DiffusionVMRDataCollator()(dataset.__getitems__(range(size)))
    video, text = ours["video_features"].float(), ours["text_features"].float()
    ours |= {"video_features": video, "text_features": text}
    theirs = {
        "src_vid": torch.cat((video, clip_positions(ours["video_mask"])), dim=-1),
        "src_vid_mask": ours["video_mask"].float(),
        "src_txt": text,
        "src_txt_mask": ours["text_mask"].float(),
    }
    targets = {
        "span_labels": [{"spans": ours["labels"][index]["spans"]} for index in range(size)],
        "saliency_pos_labels": ours["labels"]["saliency_pos"],
        "saliency_neg_labels": ours["labels"]["saliency_neg"],
    }
    return {"ours": ours, "theirs": theirs, "targets": targets}


def contenders(sizes: list[str], checkout: str | None, seed: int, variants: list[str]) -> Iterator[Contender]:
    """Yield the models to compare: for each size Moment-DETR, if there is a checkout, and then ours, and variants."""
    torch.manual_seed(seed)
    for size in sizes:
        config = DiffusionVMRConfig(**SIZES[size])
        if checkout:
            yield (theirs := official_contender(f"{OFFICIAL}, {size}", config, checkout))
        yield (ours := our_contender(f"{OURS}, {size}", config))
        if "bfloat16" in variants:
            yield bfloat16_contender(f"{ours.name}, {BFLOAT16}", ours.module)
        if "onnx" in variants and checkout:
            yield official_onnx_contender(f"{theirs.name}, {ONNX}", theirs.module, make_batch(config, 1, seed))
        if "onnx" in variants:
            yield our_onnx_contender(f"{ours.name}, {ONNX}", ours.module)


def multiply() -> Callable[[], Tensor]:
    """Return the multiplication of two matrices that measures what the machine can do in float32."""
    left, right = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE)
    return lambda: left @ right


def flops_of(job: Callable[[], Any]) -> int:
    """Run a job. Return the floating-point operations of its matrix products."""
    with OperatorCounter() as counter:
        job()
    return counter.flops


def repeat(function: Callable, batch: Batch, times: int) -> None:
    """Call a function several times."""
    for _ in range(times):
        function(batch)


def measure_inference(arguments: argparse.Namespace) -> dict:
    """
    Measure inference at several batch sizes, and a training step. All models take turns, and so does a multiplication
    of matrices, whose rate is what the machine can do.
    """
    models = list(contenders(arguments.sizes, arguments.official, arguments.seed, arguments.variants))
    config = DiffusionVMRConfig(**SIZES[arguments.sizes[0]])  # the features are the same for every size
    batches = {size: make_batch(config, size, arguments.seed) for size in {column.batch_size for column in COLUMNS}}
    jobs = {
        (model.name, column.name): partial(
            repeat, getattr(model, column.function), batches[column.batch_size], column.calls
        )
        for model in models
        for column in (COLUMNS[:1] if model.fixed_batch else COLUMNS)
    }
    flops = {place: flops_of(job) for place, job in tqdm(jobs.items(), desc="warming up")}
    measured = alternate({**jobs, "matrix": multiply()}, arguments.repeats)
    seconds = {name: seconds for name, (seconds, *_) in measured.items()}
    rate = 2 * MATRIX_SIZE**3 / seconds["matrix"]

    table = []
    for model in models:
        parameters = sum(parameter.numel() for parameter in model.module.parameters())
        row = {"model": model.name, "parameters": f"{parameters / 1e6:.1f} M"}
        for column in COLUMNS:
            place = model.name, column.name
            row[column.name] = "" if place not in jobs else f"{1000 * seconds[place] / column.calls:.1f}"
            if flops.get(place):  # those of an exported graph are not counted
                row[column.name] += f" ({flops[place] / seconds[place] / rate:.0%})"
        table.append(row)
    for ours in models:
        theirs = ours.name.replace(OURS, OFFICIAL)
        if ours.name.startswith(OURS) and (theirs, COLUMNS[0].name) in jobs:
            row = {"model": ours.name.replace(OURS, f"{OURS} / {OFFICIAL}"), "parameters": ""}
            for column in COLUMNS:
                places = (ours.name, column.name), (theirs, column.name)
                row[column.name] = f"{seconds[places[0]] / seconds[places[1]]:.2f}" if places[0] in jobs else ""
            table.append(row)
    return {
        "data": f"simulated (seed {arguments.seed}), {config.max_clips} x {config.video_feature_size} clips, "
        f"{NUM_TOKENS} x {config.text_feature_size} tokens",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "unit": "median ms (share of the machine's rate of float32 matrix products)",
        "GFLOP/s": round(rate / 1e9, 1),
        "table": table,
    }
