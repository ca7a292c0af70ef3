"""An exported model in ONNX Runtime, which `pipeline("video-moment-retrieval")` takes in place of the original."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from ..checkpoint import HUB_ARGUMENTS
from ..configuration_diffusionvmr import DiffusionVMRConfig
from ..diffusion import DiffusionSchedule
from ..json_files import read_json_object
from ..messages import one_line
from ..modeling_diffusionvmr import (
    DiffusionVMRDecoderOutput,
    DiffusionVMRForMomentRetrieval,
    DiffusionVMRMemory,
    DiffusionVMRModel,
    DiffusionVMRMomentRetrievalOutput,
    mask_of,
)
from .graphs import GRAPHS, Axes, Graph

INSTALL = "pip install 'modeling_diffusionvmr[onnx]'"


def import_onnxruntime() -> Any:
    """Return the module `onnxruntime`. Raise an ImportError that says how to install it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"onnxruntime is not installed; install it with: {INSTALL}") from error
    return onnxruntime


def check_providers(wanted: Sequence[Any], found: Sequence[str]) -> None:
    """Raise ValueError unless providers, as `InferenceSession` takes them, are found. ONNX Runtime would only warn."""
    names = list(wanted) if isinstance(wanted, (list, tuple)) else []
    names = [name[0] if isinstance(name, tuple) and len(name) == 2 else name for name in names]
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"`providers` must be a list of names or (name, options), got {wanted!r}")
    if missing := ", ".join(name for name in names if name not in found):
        raise ValueError(f"`providers`: ONNX Runtime cannot use {missing} here; it can use {', '.join(found)}")


def default_options() -> Any:
    """
    Return options for graphs that run in turn with each other and with PyTorch: as many threads as PyTorch uses, which
    stop as soon as a graph is done. By default they wait busily for more work, and take the time of the next graph.
    """
    options = import_onnxruntime().SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


class OnnxGraph:
    """
    One exported graph, as a function of tensors.

    Args:
        path: the ONNX file.
        graph: the class in `graphs` that the file was exported from.
        config: the model's configuration.
        options: arguments of `onnxruntime.InferenceSession`.

    Raises:
        ValueError: if the file is damaged, or not this graph of a model with this configuration.
        ImportError: if onnxruntime is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        graph: type[Graph],
        config: DiffusionVMRConfig,
        **options,
    ):
        runtime = import_onnxruntime()
        try:
            self.session = runtime.InferenceSession(os.fspath(path), **options)
        except Exception as error:  # onnxruntime has a class of its own for every kind of error
            raise ValueError(f"{path}: ONNX Runtime cannot load it ({one_line(error)})") from error
        for wanted, found in (
            (graph.inputs(config), self.session.get_inputs()),
            (graph.outputs(config), self.session.get_outputs()),
        ):
            shapes = {value.name: tuple(value.shape) for value in found}
            if not _fits(wanted, shapes):
                raise ValueError(f"{path}: does not fit the config: its shapes are {shapes}, expected {wanted}")

    def __call__(self, **inputs: Tensor) -> list[Tensor]:
        """Run the graph. The outputs are on the device of the inputs."""
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in inputs.items()}
        (device,) = {tensor.device for tensor in inputs.values()}
        return [torch.from_numpy(array).to(device) for array in self.session.run(None, arrays)]


def _fits(wanted: Axes, found: Axes) -> bool:
    """Return whether names are the same, and lengths of axes where they are fixed."""
    return wanted.keys() == found.keys() and all(
        len(axes) == len(found[name])
        and all(axis == other for axis, other in zip(axes, found[name]) if isinstance(axis, int))
        for name, axes in wanted.items()
    )


@dataclass
class OnnxMemory(DiffusionVMRMemory):
    """The encoder's output, with the saliency (B, Lv), which the same graph computes."""

    saliency_scores: Tensor | None = None


class OnnxNetwork(DiffusionVMRModel):
    """The exported graphs, in place of the layers of a [`DiffusionVMRModel`]."""

    def __init__(self, config: DiffusionVMRConfig, graphs: Sequence[OnnxGraph]):
        super(DiffusionVMRModel, self).__init__(config)  # without the layers
        self.schedule = DiffusionSchedule(config.num_diffusion_steps, config.signal_scale)
        self.encoder_graph, self.timestep_graph, self.denoiser_graph = graphs
        self.modulation_of: dict[int, Tensor] = {}  # (K, 2 D) of each timestep so far. The weights never change

    def encode(  # type: ignore[override]  # nothing is recorded
        self,
        video_features: Tensor,
        text_features: Tensor,
        video_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> OnnxMemory:
        """As `DiffusionVMRModel.encode`, and also compute the saliency."""
        self.check_features(video_features, text_features, video_mask, text_mask)
        video_mask, text_mask = mask_of(video_features, video_mask), mask_of(text_features, text_mask)
        video_features, video_mask = (
            part.expand(text_features.shape[0], *part.shape[1:]) for part in (video_features, video_mask)
        )
        hidden, saliency = self.encoder_graph(
            video_features=video_features.float(),
            text_features=text_features.float(),
            video_mask=video_mask.long(),
            text_mask=text_mask.long(),
        )
        video, text = hidden.split((video_mask.shape[1], text_mask.shape[1]), dim=1)
        return OnnxMemory(
            last_hidden_state=hidden, video=video, text=text, video_mask=video_mask, saliency_scores=saliency
        )

    def denoise(  # type: ignore[override]  # nothing is recorded
        self, memory: DiffusionVMRMemory, noisy_spans: Tensor, timesteps: Tensor
    ) -> DiffusionVMRDecoderOutput:
        """As `DiffusionVMRModel.denoise`, without the hidden states."""
        assert memory.video is not None and memory.video_mask is not None
        logits, spans = self.denoiser_graph(
            noisy_spans=noisy_spans,
            modulations=self.modulations(timesteps),
            video=memory.video,
            video_mask=memory.video_mask.long(),
        )
        return DiffusionVMRDecoderOutput(intermediate_logits=logits, intermediate_spans=spans)

    def modulations(self, timesteps: Tensor) -> Tensor:
        """As `DiffusionVMRDecoder.modulations`, but compute each timestep once."""
        steps = timesteps.tolist()
        for step in set(steps) - self.modulation_of.keys():
            (modulations,) = self.timestep_graph(timesteps=torch.tensor([step]))
            self.modulation_of[step] = modulations[0]
        return torch.stack([self.modulation_of[step] for step in steps]).to(timesteps.device)


class OnnxDiffusionVMR(DiffusionVMRForMomentRetrieval):
    """
    A model that `diffusionvmr export` has written, in ONNX Runtime. Diffusion and sampling are those of
    [`DiffusionVMRForMomentRetrieval`]; encoder and decoder are exported graphs. It cannot be trained.

    Load it with `from_pretrained`. It takes and returns PyTorch tensors, on the device that it is moved to, whatever
    device the graphs run on.
    """

    def __init__(self, config: DiffusionVMRConfig, graphs: Sequence[OnnxGraph]):
        with torch.device("meta"):  # weights without memory, for what the graphs replace
            super().__init__(config)
        self.model = OnnxNetwork(config, graphs)
        self.saliency_head = nn.Identity()  # type: ignore[assignment]
        self.eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path_or_id: str | os.PathLike,
        session_options: Any = None,
        providers: Sequence[Any] = ("CPUExecutionProvider",),
        **hub_kwargs,
    ) -> "OnnxDiffusionVMR":
        """
        Load an exported model.

        Args:
            path_or_id: the folder that `diffusionvmr export` wrote, or the Hub id of one.
            session_options: an `onnxruntime.SessionOptions` for all graphs. Default: as many threads as PyTorch uses
                in this process, and all optimizations of the graph.
            providers: what runs the graphs, see `onnxruntime.InferenceSession`.
            hub_kwargs: `token`, `revision`, `cache_dir`, `local_files_only`.

        Raises:
            OSError: if there is no such folder or repository.
            ValueError: if it is not an exported model, or incomplete or damaged, or if a provider cannot be used here.
            ImportError: if onnxruntime is not installed.
        """
        if unknown := hub_kwargs.keys() - set(HUB_ARGUMENTS):
            raise TypeError(f"unknown arguments {sorted(unknown)}")
        check_providers(providers, import_onnxruntime().get_available_providers())  # before anything is downloaded
        is_folder = os.path.isdir(path_or_id)
        config_file = _file(path_or_id, "config.json", hub_kwargs)
        if not is_folder:  # load all other files, and later the backbones, from the same commit
            hub_kwargs["revision"] = extract_commit_hash(str(config_file), None)
        config = _load_config(config_file, path_or_id)
        config.name_or_path = str(path_or_id)
        options = {"sess_options": session_options or default_options(), "providers": list(providers)}
        graphs = [
            OnnxGraph(_file(path_or_id, graph.file_name, hub_kwargs), graph, config, **options) for graph in GRAPHS
        ]
        # Those whose own libraries could be loaded, too
        check_providers(providers, graphs[0].session.get_providers())
        model = cls(config, graphs)
        model.hub_id = None if is_folder else str(path_or_id)
        model.hub_kwargs = hub_kwargs
        return model

    def save_pretrained(self, *args, **kwargs):
        """Raise ValueError: an exported model is its folder."""
        raise ValueError("an exported model is its folder: copy it, or upload it with `hf upload USER/NAME FOLDER`")

    @property
    def device(self) -> torch.device:
        """The device of inputs and outputs."""
        return self.model.schedule.noise_table.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of inputs and outputs, also if the graphs compute with other types."""
        return torch.float32

    @torch.no_grad()
    def forward(  # without what needs gradients or the inside of the graphs
        self,
        video_features: Tensor,
        text_features: Tensor,
        video_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        noisy_spans: Tensor | None = None,
        timesteps: Tensor | None = None,
        num_proposals: int | None = None,
        num_sampling_steps: int | None = None,
        return_dict: bool | None = None,
    ) -> DiffusionVMRMomentRetrievalOutput | tuple:
        """Run the sampler, see [`DiffusionVMRForMomentRetrieval`]."""
        return super().forward(
            video_features,
            text_features,
            video_mask,
            text_mask,
            noisy_spans,
            timesteps,
            num_proposals,
            num_sampling_steps,
            return_dict=return_dict,
        )

    def _saliency(self, memory: DiffusionVMRMemory) -> Tensor:
        """Return the saliency that `encode` has computed."""
        return memory["saliency_scores"]


def _load_config(file: Path, place: str | os.PathLike) -> DiffusionVMRConfig:
    """Load config.json of `place`. Raise ValueError if it is damaged, or not of a DiffusionVMR model."""
    fields = read_json_object(file)
    if fields.get("model_type") != DiffusionVMRConfig.model_type:
        raise ValueError(f"{place}: a model of type {fields.get('model_type')}, not DiffusionVMR")
    try:
        return DiffusionVMRConfig.from_dict(fields)
    except StrictDataclassError as error:  # which only names a validator
        raise ValueError(f"{file}: {one_line(error.__cause__ or error)}") from error


def _file(path_or_id: str | os.PathLike, name: str, hub_kwargs: dict[str, Any]) -> Path:
    """Return the path of a file of an exported model, which is downloaded if need be. See `from_pretrained`."""
    if os.path.isdir(path_or_id):
        path = Path(path_or_id, name)
        if not path.is_file():
            raise ValueError(f"{path_or_id}: has no {name}, so it is not what `diffusionvmr export` writes")
        return path
    try:
        return Path(str(cached_file(path_or_id, name, **hub_kwargs)))
    except OSError as error:
        raise OSError(
            f"{path_or_id}: not a local folder, and its {name} could not be loaded from the Hub ({one_line(error)})"
        ) from error
