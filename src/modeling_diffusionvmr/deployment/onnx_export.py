"""Export a model to a folder for ONNX Runtime, and compare the exported graphs with the original."""

import copy
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checkpoint import save_backbones
from ..modeling_diffusionvmr import DiffusionVMRForMomentRetrieval
from ..processing_diffusionvmr import DiffusionVMRProcessor
from .graphs import GRAPHS, EncoderGraph, Graph, TimestepGraph
from .onnx_model import INSTALL, OnnxGraph, import_onnxruntime

# B, Lv, Lt and N. The graphs are traced with the first one: none of its numbers is 0 or 1, which tracing takes for
# constants. All are checked.
SHAPES = ((3, 7, 5, 4), (1, 1, 1, 1), (1, 75, 12, 20), (2, 40, 32, 300), (8, 13, 3, 10))
TOLERANCE = 1e-4  # see `relative_difference`
MAX_BYTES = 2 * 10**9  # of the weights in one file


def export_onnx(
    model: DiffusionVMRForMomentRetrieval,
    processor: DiffusionVMRProcessor,
    folder: str | os.PathLike,
    int8: bool = False,
    progress: bool = False,
) -> float:
    """
    Write what `OnnxDiffusionVMR.from_pretrained` and the pipeline need: the graphs, the configuration, the processor,
    and the backbones, which stay PyTorch models.

    Args:
        model: in eval mode, in float32, on the CPU.
        processor: the model's processor.
        folder: an empty folder to write to.
        int8: then also store the weights of matrix products as int8.
        progress: show a progress bar.

    Returns:
        The largest difference between the float32 graphs and the model, see `check_graphs`.

    Raises:
        ValueError: if this difference is above `TOLERANCE`, or the model is too large for ONNX files.
        ImportError: if a package of the extra `onnx` is not installed.
    """
    folder = Path(folder)
    check_packages()
    with eager_attention(model):
        for graph in tqdm(GRAPHS, desc="exporting", unit="graph", disable=not progress):
            export_graph(graph(model), example(model, graph, *SHAPES[0]), folder)
    difference = check_graphs(model, folder)
    if int8:
        for graph in GRAPHS:
            quantize(folder / graph.file_name)
    config = copy.copy(model.config)
    config.backbones = save_backbones(model, folder)
    save_fields(json.loads(config.to_json_string()), folder / "config.json")
    save_fields(json.loads(processor.to_json_string()), folder / "processor_config.json")
    return difference


@contextmanager
def eager_attention(model: DiffusionVMRForMomentRetrieval) -> Iterator[None]:
    """
    Inside the block, compute attention with plain operations. PyTorch's own attention would be exported with more of
    them, for queries that may not attend to anything. Here, every video has a clip.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def check_packages() -> None:
    """Raise an ImportError that says how to install the extra `onnx`, unless it is installed."""
    import_onnxruntime()
    try:
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed; install it with: {INSTALL}") from error


def example(model: DiffusionVMRForMomentRetrieval, graph: type[Graph], *shape: int) -> dict[str, Tensor]:
    """Return random inputs of a graph. `shape` is B, Lv, Lt and N."""
    batch, num_clips, num_tokens, num_proposals = shape
    config, rng = model.config, torch.Generator().manual_seed(0)

    def features(length: int, size: int) -> tuple[Tensor, Tensor]:
        """Vectors of length 1, as the processor prepares them, and a mask of at least one."""
        lengths = torch.randint(1, length + 1, (batch, 1), generator=rng)
        vectors = torch.nn.functional.normalize(torch.randn(batch, length, size, generator=rng), dim=-1)
        return vectors, (torch.arange(length) < lengths).long()

    video, video_mask = features(num_clips, config.video_feature_size)
    text, text_mask = features(num_tokens, config.text_feature_size)
    if graph is EncoderGraph:
        return {"video_features": video, "text_features": text, "video_mask": video_mask, "text_mask": text_mask}
    timesteps = torch.randint(config.num_diffusion_steps, (batch,), generator=rng)
    if graph is TimestepGraph:
        return {"timesteps": timesteps}
    with torch.no_grad():
        memory = model.model.encode(video, text, video_mask, text_mask)
        modulations = model.model.decoder.modulations(timesteps)
    return {
        "noisy_spans": torch.randn(batch, num_proposals, 2, generator=rng),
        "modulations": modulations,
        "video": memory.video.contiguous(),
        "video_mask": video_mask,
    }


def export_graph(graph: Graph, inputs: dict[str, Tensor], folder: Path) -> None:
    """
    Write a graph to `folder/<its file name>`.

    Args:
        graph: the module to trace.
        inputs: an example of its inputs.
        folder: an existing folder.

    Raises:
        ValueError: if the weights do not fit into one file.
    """
    num_bytes = sum(weight.nbytes for weight in graph.parameters())
    if num_bytes > MAX_BYTES:
        raise ValueError(f"{graph.file_name}: {num_bytes:,} bytes of weights; a file has at most {MAX_BYTES:,}")
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with quiet():
        program = torch.onnx.export(
            graph.eval(),
            kwargs=inputs,
            dynamo=True,
            input_names=list(graph.inputs(graph.config)),
            output_names=list(graph.outputs(graph.config)),
            dynamic_shapes={name: free_axes(axes) for name, axes in graph.inputs(graph.config).items()},
            verbose=False,
        )
        assert program is not None
        ClearMetadataAndDocStringPass()(program.model)  # a stack trace per node, with paths of this machine
        program.save(folder / graph.file_name, external_data=False)


def free_axes(axes: tuple[str | int, ...]) -> dict[int, str]:
    """Return the names of the axes of free length by their index, as `torch.onnx.export` takes them."""
    return {index: axis for index, axis in enumerate(axes) if isinstance(axis, str)}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings of PyTorch and ONNX Runtime, which are about their own parts."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def check_graphs(model: DiffusionVMRForMomentRetrieval, folder: Path) -> float:
    """
    Compare exported graphs with the model, for random inputs of all `SHAPES`.

    Returns:
        The largest `relative_difference` of an output.

    Raises:
        ValueError: if it is above `TOLERANCE`. The message names the graph and the shape.
    """
    largest = 0.0
    for graph in GRAPHS:
        exported = OnnxGraph(folder / graph.file_name, graph, model.config)
        for shape in SHAPES:
            inputs = example(model, graph, *shape)
            with torch.no_grad():
                wanted = graph(model)(**inputs)
            where = ", ".join(f"{n} {name}" for n, name in zip(shape, ("samples", "clips", "tokens", "proposals")))
            for difference in map(relative_difference, exported(**inputs), wanted):
                if not difference <= TOLERANCE:  # so also if it is NaN
                    raise ValueError(
                        f"{graph.file_name} differs from the model by {difference:.1e}, more than {TOLERANCE:.0e} "
                        f"({where})"
                    )
                largest = max(largest, difference)
    return largest


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference of two tensors, divided by the largest wanted number if that is above 1."""
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item()


def quantize(path: Path) -> None:
    """
    Store the weights of a graph's matrix products as int8, with one scale per channel: with one scale per matrix, the
    scores of the embedded model change by 0.2. Activations are quantized when the graph runs.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options = {"weight_type": QuantType.QInt8, "per_channel": True, "op_types_to_quantize": ["MatMul", "Gemm"]}
    with quiet():
        quantize_dynamic(path, path, **options)


def save_fields(fields: dict[str, Any], path: Path) -> None:
    """Write a configuration as JSON, without the fields that refer to code in a checkpoint."""
    kept = {name: value for name, value in fields.items() if name not in ("auto_map", "custom_pipelines")}
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
