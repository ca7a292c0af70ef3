"""The embedded model, and what `diffusionvmr export` makes of it."""

from pathlib import Path

import pytest

from modeling_diffusionvmr import DEFAULT_MODEL, DiffusionVMRForMomentRetrieval
from modeling_diffusionvmr.cli import main


@pytest.fixture(scope="session")
def model() -> DiffusionVMRForMomentRetrieval:
    return DiffusionVMRForMomentRetrieval.from_pretrained(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "new" / "onnx"
    main(["export", "embedded", str(folder)])
    return folder
