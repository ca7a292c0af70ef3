import ast
import re
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

import modeling_diffusionvmr

PUBLIC_NAMES = [
    *("DiffusionVMRConfig", "DiffusionVMRModel", "DiffusionVMRForMomentRetrieval", "DiffusionVMRProcessor"),
    *("VideoMomentRetrievalPipeline", "MomentRetrievalDataset", "DiffusionVMRDataCollator", "DiffusionVMRTrainer"),
    *("open_features", "load_annotations", "evaluate_predictions", "DEFAULT_MODEL"),
    "OnnxDiffusionVMR",
    *("Backbone", "FrameSampling", "load_backbone", "open_video", "register_backbone"),
]
# What each folder must not import from
FORBIDDEN = {
    "data": {"training", "synthetic", "cli", "presentation", "deployment", "app"},
    "training": {"synthetic", "cli", "presentation", "deployment", "app"},
    "synthetic": {"training", "cli", "presentation", "deployment", "app"},
    "presentation": {"training", "synthetic", "cli", "deployment", "app"},
    "deployment": {"data", "training", "synthetic", "cli", "presentation", "app"},
    "app": {"training", "cli", "deployment"},
}
PACKAGE = Path(modeling_diffusionvmr.__file__).parent


def modules_imported_by(path: Path) -> set[str]:
    """Return the modules of the package that a file imports anywhere, as dotted names inside the package."""
    package = [PACKAGE.name, *path.relative_to(PACKAGE).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) + 1 - node.level] if node.level else []
            origin = [*origin, *(node.module.split(".") if node.module else [])]
            # `from .data import files` may name a module, too
            names |= {".".join([*origin, alias.name]) for alias in node.names} | {".".join(origin)}
    return {name.partition(".")[2] for name in names if name.split(".")[0] == PACKAGE.name}


@pytest.fixture
def core(tiny_config, tmp_path) -> set[str]:
    """The names of the modules that a saved checkpoint contains."""
    modeling_diffusionvmr.DiffusionVMRForMomentRetrieval(tiny_config()).save_pretrained(tmp_path)
    modeling_diffusionvmr.DiffusionVMRProcessor([12], 8).save_pretrained(tmp_path)
    return {path.stem for path in tmp_path.glob("*.py")}


def test_core_imports_only_itself(core):
    assert {"modeling_diffusionvmr", "processing_diffusionvmr", "pipeline_diffusionvmr", "video", "checks"} <= core
    for name in core:
        # The package itself is not part of a checkpoint either
        imported = modules_imported_by(PACKAGE / f"{name}.py")
        assert {module.split(".")[0] for module in imported} <= core, name


def test_core_files_import_only_from_those_above_them(core):
    """In the table of docs/explanation/architecture.md, which lists all of them."""
    text = (PACKAGE.parents[1] / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)\.py` \|", text.partition("**Folders")[0], re.MULTILINE)
    assert set(table) == core and len(table) == len(core)
    for index, name in enumerate(table):
        imported = {module.split(".")[0] for module in modules_imported_by(PACKAGE / f"{name}.py")} - {""}
        below = imported - set(table[:index])
        assert below == ({"pipeline_diffusionvmr"} if name == "modeling_diffusionvmr" else set()), name


def test_folders_import_in_one_direction():
    for folder, forbidden in FORBIDDEN.items():
        paths = list((PACKAGE / folder).rglob("*.py"))
        assert len(paths) > 1
        for path in paths:
            imported = {module.split(".")[0] for module in modules_imported_by(path)}
            assert imported & forbidden == set(), path


def test_imports_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "modeling_diffusionvmr")
    path = tmp_path / "modeling_diffusionvmr" / "data" / "module.py"
    path.parent.mkdir(parents=True)
    lines = [
        "import os",
        "from json import x",
        "import modeling_diffusionvmr.a",
        "from modeling_diffusionvmr.b import x",
    ]
    lines += ["from .c import x", "from ..d import x", "from .. import e", "from . import f"]
    lines += ["def g():", "    from ..h.i import x"]
    path.write_text("\n".join(lines))
    found = {name.removesuffix(".x") for name in modules_imported_by(path)}
    assert found == {"a", "b", "data.c", "d", "", "e", "data", "data.f", "h.i"}


def test_public_names():
    for name in PUBLIC_NAMES:
        assert getattr(modeling_diffusionvmr, name) is not None
        assert name in modeling_diffusionvmr.__all__ and name in dir(modeling_diffusionvmr)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = modeling_diffusionvmr.nothing
    with pytest.raises(ImportError):
        from modeling_diffusionvmr import nothing  # noqa: F401


def test_all_names_exist():
    namespace = {}
    exec("from modeling_diffusionvmr import *", namespace)
    assert set(modeling_diffusionvmr.__all__) <= namespace.keys()


def test_auto_classes(tiny_config, tmp_path):
    config = tiny_config()
    assert type(AutoConfig.for_model("diffusionvmr")) is modeling_diffusionvmr.DiffusionVMRConfig
    model = AutoModel.from_config(config)
    assert type(model) is modeling_diffusionvmr.DiffusionVMRForMomentRetrieval
    model.save_pretrained(tmp_path)
    modeling_diffusionvmr.DiffusionVMRProcessor([12], 8).save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is modeling_diffusionvmr.DiffusionVMRForMomentRetrieval
    assert type(AutoProcessor.from_pretrained(tmp_path)) is modeling_diffusionvmr.DiffusionVMRProcessor


def test_pipeline_task():
    _, task, _ = PIPELINE_REGISTRY.check_task("video-moment-retrieval")
    assert task["impl"] is modeling_diffusionvmr.VideoMomentRetrievalPipeline
    assert task["pt"] == (AutoModel,)


def test_default_model_is_a_folder_of_the_package():
    folder = Path(modeling_diffusionvmr.__file__).parent / "default_model"
    assert modeling_diffusionvmr.DEFAULT_MODEL == str(folder)
