"""
Check a GPU against the CPU, and time inference and training on it. Prints one table last.

It trains on simulated features for four minutes: of QVHighlights' queries where ANNOTATIONS_DIR is given, otherwise of
made-up rows of the same lengths. All takes at most eight minutes: what is left after the training is for
`torch.compile`. Without a GPU everything runs on the CPU, and what only a GPU has is left out.
"""

import argparse
import copy
import math
import os
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import TrainerCallback, set_seed

from benchmark_common import print_table
from benchmark_samples import NUM_CLIPS, NUM_TOKENS, simulate_truth
from benchmark_training import measure_training
from modeling_diffusionvmr import (
    DiffusionVMRConfig,
    DiffusionVMRDataCollator,
    DiffusionVMRForMomentRetrieval,
    DiffusionVMRProcessor,
    DiffusionVMRTrainer,
    DiffusionVMRTrainingArguments,
    MomentRetrievalDataset,
    load_annotations,
    open_features,
)
from modeling_diffusionvmr.cli.errors import run_safely
from modeling_diffusionvmr.cli.options import CommandParser
from modeling_diffusionvmr.data.annotations import SALIENCY_CLIP_SECONDS
from modeling_diffusionvmr.synthetic.simulated_features import SimulatedFeatures
from modeling_diffusionvmr.synthetic.simulated_folder import write_simulated_features
from modeling_diffusionvmr.training.prediction import MODEL_INPUTS
from modeling_diffusionvmr.training.presets import load_preset

TRAIN_FILE, VAL_FILE = "highlight_train_release.jsonl", "highlight_val_release.jsonl"
EPOCHS_OF_THE_PAPER = 400
TOTAL_SECONDS = 480.0  # of all parts
LAST_SECONDS = 30.0  # kept for the evaluation, which follows the training
COMPILE_SECONDS = 75.0  # no compilation begins with less time left

Rows = list[dict[str, str]]  # of the table: what, value
Way = Callable[[DiffusionVMRForMomentRetrieval, dict[str, Tensor]], Callable[[], Any]]
"""Turns a model and a batch into the function to time."""


@dataclass(frozen=True)
class Plan:
    """What is measured: the paper's configuration, or one that a CPU runs in seconds."""

    preset: str  # whose feature sizes the split of a training step has
    fields: Mapping[str, Any]  # of the configuration
    backbone_sizes: tuple[int, ...]
    batch_sizes: tuple[int, ...]  # of inference
    queries: tuple[int, int]  # to train and to evaluate on
    training_seconds: float
    repeats: int
    steps: int  # of a training step's split
    device: torch.device
    annotations: Path | None
    output_dir: Path
    started: float = field(default_factory=time.perf_counter)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        return TOTAL_SECONDS - (time.perf_counter() - self.started)

    def config(self, **changes) -> DiffusionVMRConfig:
        return DiffusionVMRConfig(**{**self.fields, **changes})


def paper_plan(**options) -> Plan:
    fields = load_preset("qvhighlights")["config"]
    sizes = tuple(backbone["feature_size"] for backbone in fields["backbones"])
    return Plan("qvhighlights", fields, sizes, (1, 100), (7218, 1550), 240.0, 20, 40, **options)


def tiny_plan(**options) -> Plan:
    small = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 1}
    small |= {"video_feature_size": 24, "text_feature_size": 8, "backbones": None, "dynamic_size": 4, "roi_bins": 4}
    fields = {**load_preset("qvhighlights")["config"], **small}
    return Plan("qvhighlights_small", fields, (16, 8), (1, 2), (64, 32), 2.0, 2, 2, **options)


# The same numbers on both devices


def random_batch(config: DiffusionVMRConfig, size: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Make features of the lengths of QVHighlights."""
    generator = torch.Generator().manual_seed(size)
    video = torch.randn(size, config.max_clips, config.video_feature_size, generator=generator)
    text = torch.randn(size, NUM_TOKENS, config.text_feature_size, generator=generator)
    return {"video_features": video.to(device, dtype), "text_features": text.to(device, dtype)}


def check_against_cpu(plan: Plan) -> Rows:
    """Compare a training step and sampling in float32, without dropout, from the same weights and noise."""
    config = plan.config(dropout=0.0, input_dropout=0.0)
    torch.manual_seed(0)
    model = DiffusionVMRForMomentRetrieval(config)
    labels = [{"spans": torch.tensor([[0.3, 0.2], [0.7, 0.1]])}, {"spans": torch.tensor([[0.5, 0.4]])}]
    noise = {"noisy_spans": torch.randn(2, config.num_proposals, 2), "timesteps": torch.tensor([100, 900])}
    losses, gradients, spans = [], [], []
    for device in (torch.device("cpu"), plan.device):
        on_device = copy.deepcopy(model).to(device)
        batch = random_batch(config, 2, device, torch.float32)
        loss = on_device.train()(
            **batch,
            labels=[{name: value.to(device) for name, value in label.items()} for label in labels],
            **{name: value.to(device) for name, value in noise.items()},
        ).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in on_device.parameters() if p.grad is not None]))
        with torch.inference_mode():
            spans.append(on_device.eval()(**batch, num_sampling_steps=2).pred_spans.cpu())
    gradient = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    return [
        {"what": "training step, loss on CPU and device", "value": f"{losses[0]:.6f}, {losses[1]:.6f}"},
        {"what": "training step, relative difference of gradients", "value": f"{gradient.item():.1e}"},
        {"what": "sampling, largest difference of spans", "value": f"{(spans[0] - spans[1]).abs().max().item():.1e}"},
    ]


def check_resume(plan: Plan) -> Rows:
    """
    Compare trainings of a tiny model that are not interrupted with those that resume on the device: from a checkpoint
    of the device, and from one of the CPU. There is no dropout, which draws other numbers on every device.
    """
    cpu = torch.device("cpu")
    tiny = tiny_plan(device=cpu, annotations=None, output_dir=plan.output_dir)
    train_dataset, _ = made_up_datasets(tiny)

    def train(device: torch.device, folder: Path, checkpoint: str | None = None) -> Tensor:
        """Return all weights after six steps, as one vector. Three steps are saved in `folder`."""
        set_seed(0)
        trainer = DiffusionVMRTrainer(
            model=DiffusionVMRForMomentRetrieval(tiny.config(dropout=0.0, input_dropout=0.0)),
            args=training_arguments(
                replace(tiny, device=device), folder, max_steps=6, save_strategy="steps", save_steps=3
            ),
            train_dataset=train_dataset,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return torch.cat([parameter.detach().flatten().cpu() for parameter in trainer.model.parameters()])

    rows = []
    with tempfile.TemporaryDirectory() as work:
        for device, of in ((plan.device, "the device"), (cpu, "the CPU")):
            folder = Path(work, of)
            whole = train(device, folder)
            resumed = train(plan.device, folder, f"{folder}/checkpoint-3")
            difference = (whole - resumed).norm() / whole.norm()
            what = f"training resumed from a checkpoint of {of}, relative difference of weights"
            rows.append({"what": what, "value": f"{difference.item():.1e}"})
    return rows


# Inference


def time_inference(plan: Plan) -> Rows:
    """Time one sampling step for each batch size and type: eager, and replayed as a CUDA graph."""
    ways: dict[str, Way] = {"eager": lambda model, batch: lambda: model(**batch)}
    if plan.is_gpu:
        ways["CUDA graph"] = captured
    return [*time_ways(plan, ways), {"what": "  peak memory of inference", "value": peak_memory(plan)}]


def time_compiled(plan: Plan) -> Rows:
    """Time one sampling step with `torch.compile`, as far as the time allows. It has a warm-up of its own."""
    return time_ways(plan, {"torch.compile": compiled}) if plan.is_gpu else []


def time_ways(plan: Plan, ways: Mapping[str, Way]) -> Rows:
    """Time one sampling step for each batch size, type and way to run it."""
    torch.manual_seed(0)
    model = DiffusionVMRForMomentRetrieval(plan.config()).to(plan.device).eval()
    if plan.is_gpu:
        torch.cuda.reset_peak_memory_stats(plan.device)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        for size in plan.batch_sizes:
            batch = random_batch(model.config, size, plan.device, dtype)
            for way, make in ways.items():
                if make is compiled and plan.seconds_left < COMPILE_SECONDS:
                    value = "skipped: no time left"
                else:
                    value = time_or_fault(plan, make, model, batch)
                what = f"inference, batch {size}, {str(dtype).removeprefix('torch.')}, {way}"
                rows.append({"what": what, "value": value})
    return rows


@torch.inference_mode()
def time_or_fault(plan: Plan, make: Way, model: DiffusionVMRForMomentRetrieval, batch: dict[str, Tensor]) -> str:
    """Return the time of a call, or why there is none: what cannot be compiled or captured must not end the check."""
    try:
        return f"{1000 * seconds_of(make(model, batch), plan):.2f} ms"
    except Exception as error:  # compilers raise errors of any type
        return f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]


def compiled(model: DiffusionVMRForMomentRetrieval, batch: dict[str, Tensor]) -> Callable[[], Any]:
    """Return a call of the compiled model. Graphs of other shapes are dropped, so that these shapes are constants."""
    torch.compiler.reset()
    fast = torch.compile(model)
    return lambda: fast(**batch)


def captured(model: DiffusionVMRForMomentRetrieval, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Capture a call of the model as a CUDA graph, and return the function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # allocations and library handles of the first calls must not be captured
        for _ in range(3):
            model(**batch)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(**batch)
    return graph.replay


def seconds_of(run: Callable[[], Any], plan: Plan) -> float:
    """Return the median seconds of a call, after a warm-up, waiting for the device."""
    seconds = []
    for _ in range(3 + plan.repeats):
        started = time.perf_counter()
        run()
        if plan.is_gpu:
            torch.cuda.synchronize(plan.device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[3:])


# Training


def peak_memory(plan: Plan) -> str:
    """Return the largest memory of the device in use since it was last reset."""
    return f"{torch.cuda.max_memory_allocated(plan.device) / 2**20:.0f} MiB" if plan.is_gpu else "not measured on a CPU"


def count_synchronizations(plan: Plan) -> Rows:
    """Count how often a training step and a sampling step wait for the device. Matching has to, once per step."""
    if not plan.is_gpu:
        return []
    torch.manual_seed(0)
    model = DiffusionVMRForMomentRetrieval(plan.config()).to(plan.device)
    optimizer = torch.optim.AdamW(model.parameters())
    train_dataset, _ = made_up_datasets(replace(plan, queries=(8, 1)))
    batch = send_to_device(DiffusionVMRDataCollator()(train_dataset.__getitems__(range(8))), plan.device)
    inputs = {name: batch[name] for name in MODEL_INPUTS}

    def training_step() -> None:
        with torch.autocast(plan.device.type, torch.bfloat16):
            loss = model.train()(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()

    def sampling_step() -> None:
        with torch.inference_mode():
            model.eval()(**inputs)

    rows = []
    for what, run in (("training", training_step), ("sampling", sampling_step)):
        run()
        torch.cuda.synchronize(plan.device)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        places = [f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught]
        rows.append(
            {"what": f"synchronizations of a {what} step", "value": f"{len(places)} {' '.join(places)}".strip()}
        )
    return rows


def split_training_step(plan: Plan) -> Rows:
    """Time the parts of a training step in bfloat16, one after the other."""
    flags = ["--bf16"] if plan.is_gpu else ["--bf16", "--use_cpu"]
    no_flags = ("backbones", "video_feature_size", "text_feature_size")
    flags += [f"--{name}={value}" for name, value in plan.fields.items() if name not in no_flags]
    arguments = argparse.Namespace(
        preset=plan.preset, flags=flags, batch_size=32, steps=plan.steps, seed=0, device=plan.device.type
    )
    result = measure_training(arguments)
    rows = [
        {"what": "training, batch 32, bfloat16, parts in turn", "value": f"{result['samples per second']} samples/s"}
    ]
    for part in result["table"]:
        rows.append({"what": f"  {part['what']}", "value": f"{part['ms per step']} ms, {part['share']}"})
    return [*rows, {"what": "  peak memory", "value": f"{result['peak MiB']} MiB"}]


class MadeUpFeatures(Mapping):
    """Random float16 features of equal length, made on the device in one call and kept in host memory."""

    def __init__(self, identifiers: Sequence, length: int, size: int, device: torch.device):
        features = torch.randn(len(identifiers), length, size, dtype=torch.float16, device=device)
        self.features = features.cpu().numpy()
        self.place = {identifier: index for index, identifier in enumerate(identifiers)}

    def __getitem__(self, identifier):
        return self.features[self.place[identifier]]

    def __iter__(self) -> Iterator:
        return iter(self.place)

    def __len__(self) -> int:
        return len(self.place)


def made_up_datasets(plan: Plan) -> tuple[MomentRetrievalDataset, MomentRetrievalDataset]:
    """Return data sets to train and to evaluate on, of random features."""
    datasets = []
    for seed, count in enumerate(plan.queries):
        rows = simulate_truth(seed, count)
        videos, sentences = [row["vid"] for row in rows], [row["qid"] for row in rows]
        video = [MadeUpFeatures(videos, NUM_CLIPS, size, plan.device) for size in plan.backbone_sizes]
        text = MadeUpFeatures(sentences, NUM_TOKENS, plan.config().text_feature_size, plan.device)
        datasets.append((rows, video, text))
    return make_datasets(plan, *datasets)


def simulated_datasets(plan: Plan, folder: Path) -> tuple[MomentRetrievalDataset, MomentRetrievalDataset]:
    """Return data sets of simulated features of QVHighlights' queries, written to a folder first."""
    splits = [
        load_annotations(plan.annotations / name)[:count] for name, count in zip((TRAIN_FILE, VAL_FILE), plan.queries)
    ]
    motion_size, clip_size = plan.backbone_sizes
    simulation = SimulatedFeatures([row for rows in splits for row in rows], seed=0, size=clip_size)
    write_simulated_features(simulation, folder, motion_size, workers=os.cpu_count() or 1)
    video, text = (
        [open_features(folder / "slowfast"), open_features(folder / "clip")],
        open_features(folder / "clip_text"),
    )
    return make_datasets(plan, *((rows, video, text) for rows in splits))


def make_datasets(plan: Plan, training, evaluation) -> tuple[MomentRetrievalDataset, MomentRetrievalDataset]:
    config = plan.config()
    processor = DiffusionVMRProcessor(plan.backbone_sizes, config.text_feature_size, round_to=SALIENCY_CLIP_SECONDS)
    options = {"processor": processor, "clip_seconds": float(SALIENCY_CLIP_SECONDS)}
    return (
        MomentRetrievalDataset(*training, **options, config=config),
        MomentRetrievalDataset(*evaluation, **options),
    )


def training_arguments(plan: Plan, folder: Path, **changes) -> DiffusionVMRTrainingArguments:
    """The arguments of the paper's preset, but for those that evaluate and save."""
    fields = {**load_preset("qvhighlights")["training"], "use_cpu": not plan.is_gpu, "disable_tqdm": True}
    fields |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    fields |= {"metric_for_best_model": None, "dataloader_pin_memory": plan.is_gpu}
    return DiffusionVMRTrainingArguments(**{**fields, "output_dir": str(folder), **changes})


class TimeLimit(TrainerCallback):
    """
    Stops a training after some seconds, counted from its first step, which warms up. The number of proposals grows over
    these seconds as it does over the paper's training, since a step with few proposals is faster.
    """

    def __init__(self, seconds: float, max_proposals: int):
        self.limit = seconds
        self.max_proposals = max_proposals
        self.num_proposals = 1
        self.started = self.last = 0.0
        self.seconds: dict[int, list[float]] = defaultdict(list)  # of each step, by the number of proposals

    @property
    def elapsed(self) -> float:
        return self.last - self.started

    @property
    def num_steps(self) -> int:
        return sum(map(len, self.seconds.values()))

    def seconds_per_step(self) -> float:
        """Return the mean over a training in which every number of proposals has equally many steps."""
        return statistics.mean(statistics.mean(seconds) for seconds in self.seconds.values())

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if self.started:
            self.seconds[self.num_proposals].append(now - self.last)
        else:
            self.started = now
        self.last = now
        progress = self.elapsed / self.limit
        self.num_proposals = min(1 + int(progress * self.max_proposals), self.max_proposals)
        control.should_training_stop = progress >= 1


class TimedTrainer(DiffusionVMRTrainer):
    """A trainer whose number of proposals a `TimeLimit` sets."""

    limit: TimeLimit

    def training_proposals(self) -> int:
        return self.limit.num_proposals


def train_for_a_while(plan: Plan) -> Rows:
    """Train as long as the plan allows, evaluate, and say how long the paper's training would take."""
    set_seed(0)
    with tempfile.TemporaryDirectory() as work:
        train_dataset, eval_dataset = (
            simulated_datasets(plan, Path(work)) if plan.annotations else made_up_datasets(plan)
        )
        workers = min(8, (os.cpu_count() or 1) - 1) if plan.is_gpu else 0
        arguments = training_arguments(
            plan, plan.output_dir, bf16=True, num_train_epochs=EPOCHS_OF_THE_PAPER, dataloader_num_workers=workers
        )
        # The data is ready: the limit excludes it, but not what all parts may take
        seconds = max(1.0, min(plan.training_seconds, plan.seconds_left - LAST_SECONDS))
        limit = TimeLimit(seconds, plan.config().max_training_proposals)
        trainer = TimedTrainer(
            model=DiffusionVMRForMomentRetrieval(plan.config()),
            args=arguments,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[limit],
        )
        trainer.limit = limit
        if plan.is_gpu:
            torch.cuda.reset_peak_memory_stats(plan.device)
        trainer.train()
        memory = peak_memory(plan)
        trainer.save_model()
        started = time.perf_counter()
        metrics = trainer.evaluate()
        evaluated = time.perf_counter() - started
    batch_size = arguments.per_device_train_batch_size
    rate = limit.num_steps * batch_size / limit.elapsed
    data = "simulated features of QVHighlights" if plan.annotations else "made-up features"
    steps = EPOCHS_OF_THE_PAPER * math.ceil(len(train_dataset) / batch_size)
    minutes = steps * limit.seconds_per_step() / 60
    return [
        {"what": f"training with Trainer, {data}", "value": f"{rate:.0f} samples/s, bfloat16"},
        {"what": "  epochs", "value": f"{trainer.state.epoch:.2f} in {limit.elapsed:.0f} s"},
        {"what": f"  {EPOCHS_OF_THE_PAPER} epochs would take", "value": f"{minutes:.1f} min"},
        {"what": "  peak memory of training", "value": memory},
        {"what": f"  evaluation of {len(eval_dataset)} queries", "value": f"{evaluated:.1f} s"},
        {"what": "  R1@0.5, mAP", "value": f"{metrics['eval_MR-full-R1@0.5']}, {metrics['eval_MR-full-mAP']}"},
        {"what": "  checkpoint", "value": str(plan.output_dir)},
    ]


PARTS = (
    check_against_cpu,
    check_resume,
    count_synchronizations,
    time_inference,
    split_training_step,
    train_for_a_while,
    time_compiled,
)
"""In this order. The last one takes the time that is left."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="scripts/gpu_check.sh", description=__doc__)
    parser.add_argument(
        "annotations", nargs="?", type=Path, metavar="ANNOTATIONS_DIR", help=f"folder of {TRAIN_FILE} and {VAL_FILE}"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu_check"), help="gets the trained checkpoint")
    parser.add_argument("--tiny", action="store_true", help="a configuration that runs in seconds on a CPU")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> None:
    """Run all parts and print their rows as one table."""
    for name in (TRAIN_FILE, VAL_FILE) if arguments.annotations else ():
        if not (arguments.annotations / name).is_file():
            raise FileNotFoundError(f"{arguments.annotations / name}: no such file")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make = tiny_plan if arguments.tiny else paper_plan
    plan = make(device=device, annotations=arguments.annotations, output_dir=arguments.output_dir)
    name = torch.cuda.get_device_name(device) if plan.is_gpu else f"CPU, {torch.get_num_threads()} threads"
    rows = [{"what": "device", "value": f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"}]
    for part in PARTS:
        started = time.perf_counter()
        rows += part(plan)
        print(f"{part.__name__}: {time.perf_counter() - started:.0f} s", flush=True)
    print(f"in all: {time.perf_counter() - plan.started:.0f} s", flush=True)
    print_table(rows)


if __name__ == "__main__":
    run_safely(main, parse_arguments())
