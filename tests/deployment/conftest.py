"""Fixtures for the tests of the export."""

import pytest

from modeling_diffusionvmr import DEFAULT_MODEL, DiffusionVMRForMomentRetrieval


@pytest.fixture(scope="session")
def model() -> DiffusionVMRForMomentRetrieval:
    """The embedded model."""
    return DiffusionVMRForMomentRetrieval.from_pretrained(DEFAULT_MODEL)
