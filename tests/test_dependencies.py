"""What pyproject.toml declares is what the code imports, and the other way round."""

import ast
import re
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from modeling_diffusionvmr.cli.errors import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "modeling_diffusionvmr"
OWN = {"modeling_diffusionvmr", "diffusionvmr_command"}
MODULE_OF = {"onnx-ir": "onnx_ir", "pillow": "PIL", "pyyaml": "yaml"}  # where it is not the distribution's name
# Declared, but imported by no line of ours
NOT_IMPORTED = {
    "pillow": "transformers' image processors load it",
    "accelerate": "transformers.Trainer loads it",
    "mypy": "run by `make lint`",
    "ruff": "run by `make lint`",
    "parameterized": "the tests of transformers import it",
    "pytest-timeout": "a plugin of pytest",
    "pytest-xdist": "a plugin of pytest",
    "types-pyyaml": "read by mypy",
    "types-tqdm": "read by mypy",
}


def declared(extra: str | None = None) -> set[str]:
    """The distributions of the core dependencies, or of an extra."""
    names = set()
    for requirement in requires("modeling_diffusionvmr"):
        name = re.match(r"[\w.-]+", requirement)[0].lower()
        of_extra = re.search(r"extra == [\"'](\w+)[\"']", requirement)
        if (of_extra[1] if of_extra else None) == extra and name != "modeling-diffusionvmr":
            names.add(name)
    return names - OWN


def modules(distributions: set[str]) -> set[str]:
    return {MODULE_OF.get(name, name) for name in distributions}


def imported(*paths: Path) -> set[str]:
    """Third-party modules that Python files import, at their top or later."""
    names = set()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names.add(node.module.partition(".")[0])
    siblings = {file.stem for folder in ("scripts", "tests") for file in (ROOT / folder).rglob("*.py")}
    return names - set(sys.stdlib_module_names) - OWN - siblings


def test_the_pipeline_needs_the_core_dependencies_alone():
    core = [path for path in PACKAGE.glob("*.py") if path.name != "plotting.py"]
    assert imported(*core, PACKAGE / "cli" / "retrieve.py") <= modules(declared())


def test_the_package_imports_what_is_declared():
    assert imported(ROOT / "src") <= modules(declared() | declared("train") | declared("onnx") | declared("app"))


def test_everything_imports_what_is_declared():
    folders = [ROOT / name for name in ("src", "scripts", "dataset_scripts", "metrics", "tests")]
    # `standalone_eval` is of a checkout that a benchmark may be pointed to, `datasets` writes with pyarrow
    assert imported(*folders) - {"standalone_eval", "transformers_modules"} <= modules(
        declared() | declared("train") | declared("onnx") | declared("app") | declared("dev")
    )


@pytest.mark.parametrize(
    "extra, folders",
    [
        (None, ["src"]),
        ("train", ["src", "metrics"]),
        ("onnx", ["src"]),
        ("app", ["src"]),
        ("dev", ["scripts", "tests"]),
    ],
)
def test_what_is_declared_is_imported(extra, folders):
    used = imported(*(ROOT / folder for folder in folders))
    unused = {name for name in declared(extra) if MODULE_OF.get(name, name) not in used}
    assert unused <= NOT_IMPORTED.keys()


@pytest.mark.parametrize("extra", EXTRAS)
def test_errors_name_the_extra_of_its_modules(extra):
    assert set(EXTRAS[extra]) == modules(declared(extra))


def test_the_web_page_resolves():
    """Gradio needs an older Pillow than the newest. Without a bound, pip silently takes Gradio 5."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    (gradio,) = (Requirement(line) for line in requires("modeling_diffusionvmr") if line.startswith("gradio>="))
    assert Version("6.30") not in gradio.specifier
    assert version("gradio") in gradio.specifier and pins["gradio"] in gradio.specifier
    for needed in map(Requirement, requires("gradio")):
        if needed.marker is None or needed.marker.evaluate():
            name = canonicalize_name(needed.name)
            pinned = {canonicalize_name(pin): number for pin, number in pins.items()}
            assert pinned[name] in needed.specifier, name
            assert version(name) in needed.specifier, name
