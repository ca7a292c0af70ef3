"""
Write the folder of a Hugging Face Space that serves the page of `diffusionvmr app`: the package itself, `app.py`,
`requirements.txt`, and a `README.md` with the header that the Hub reads. Push it with `hf upload`.
"""

import argparse
import platform
import re
import shutil
from collections.abc import Sequence
from importlib.metadata import requires, version
from pathlib import Path

import modeling_diffusionvmr
from modeling_diffusionvmr.cli.errors import run_safely
from modeling_diffusionvmr.cli.options import CommandParser, check_output

PACKAGE = Path(modeling_diffusionvmr.__file__).parent
APP = """\
from modeling_diffusionvmr.cli import main

main(["app", "--host", "0.0.0.0", "--port", "7860"{options}])
"""
README = """\
---
title: Find moments in a video
emoji: 🎬
colorFrom: blue
colorTo: gray
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
license: apache-2.0
short_description: Find moments in a video by describing them
---

Find moments in a video by describing them, with DiffusionVMR ([arXiv 2308.15109](https://arxiv.org/abs/2308.15109)).
Choose an example or upload a video, type one sentence per line, and play the moments that match.
"""


def main(arguments: argparse.Namespace) -> None:
    """Write the folder."""
    output = arguments.output
    check_output(output, "OUTPUT")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output}: not empty")
    shutil.copytree(PACKAGE, output / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    options = f', "--model", "{arguments.model}"' if arguments.model else ""
    (output / "app.py").write_text(APP.format(options=options), encoding="utf-8")
    (output / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")
    python = ".".join(platform.python_version_tuple()[:2])
    (output / "README.md").write_text(README.format(gradio=version("gradio"), python=python), encoding="utf-8")
    print(f"wrote {output}; push it with: hf upload USER/NAME {output} --repo-type space")


def requirements() -> list[str]:
    """Return what the page needs besides Gradio, whose version the header of the README sets."""
    needed = [line for line in requires(PACKAGE.name) or [] if "extra ==" not in line or re.search(r"\bapp\b", line)]
    names = [line.partition(";")[0].strip() for line in needed]
    return [name for name in names if not name.startswith((PACKAGE.name, "gradio"))]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="python scripts/make_space.py", description=__doc__)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write")
    parser.add_argument("--model", metavar="USER/NAME", help="a model on the Hub (default: the embedded one)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_safely(main, parse_arguments())
