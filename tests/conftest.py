"""Shared fixtures."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from modeling_diffusionvmr import DiffusionVMRConfig
from modeling_diffusionvmr.cli import main
from video_server import VideoServer


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of official files beside the repository. Tests that need it are skipped if it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no folder of official files beside the repository")
    return folder


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def tiny_config():
    """Return a function that creates the configuration of a tiny model. Arguments override its fields."""

    def make(**changes) -> DiffusionVMRConfig:
        fields = {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "video_feature_size": 12,
            "text_feature_size": 8,
            "max_clips": 20,
            "max_tokens": 10,
            "num_diffusion_steps": 100,
            "num_proposals": 5,
            "max_training_proposals": 6,
            "roi_bins": 4,
            "dynamic_size": 8,
        }
        return DiffusionVMRConfig(**{**fields, **changes})

    return make


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """What `diffusionvmr export` makes of the embedded model."""
    folder = tmp_path_factory.mktemp("export") / "new" / "onnx"
    main(["export", "embedded", str(folder)])
    return folder


@pytest.fixture
def traced_before(exported, monkeypatch) -> None:
    """Let further exports of the embedded model copy the graphs, instead of tracing for half a minute."""

    def copy(graph, inputs, folder):
        shutil.copy(exported / graph.file_name, folder / graph.file_name)

    monkeypatch.setattr("modeling_diffusionvmr.deployment.onnx_export.export_graph", copy)


@pytest.fixture
def video_server(monkeypatch) -> Iterator[VideoServer]:
    """A web server on the loopback. Put the content of files into `video_server.files`."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    with VideoServer() as server:
        yield server
