"""`diffusionvmr export`: write a model for ONNX Runtime."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .options import CommandParser, check_output, load_model

FORMATS = ("onnx",)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `diffusionvmr export`."""
    parser = CommandParser(
        "export",
        description="Write a model for ONNX Runtime, and check that it gives the same numbers. The folder goes into\n"
        "pipeline('video-moment-retrieval', model=OnnxDiffusionVMR.from_pretrained(OUTPUT)). Backbones are not\n"
        "converted: they run in PyTorch.",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, Hub id, or `embedded`")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; it must be new or empty")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="format to write (default: onnx)")
    parser.add_argument("--int8", action="store_true", help="store weights as int8: a smaller, less exact model")
    parser.set_defaults(trust_remote_code=False)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Export the model. The folder appears when it is complete."""
    from ..data.files import move_into_place, staging
    from ..deployment.onnx_export import check_packages, export_onnx

    check_packages()
    output = Path(arguments.output).absolute()
    check_output(output, "OUTPUT")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{arguments.output}: is not empty; choose a new folder")
    model, processor = load_model(arguments)
    output.parent.mkdir(parents=True, exist_ok=True)
    with staging(output) as partial:
        partial.mkdir()
        difference = export_onnx(model.float(), processor, partial, arguments.int8, progress=True)
        move_into_place(partial, output)
    before = ", before weights were stored as int8" if arguments.int8 else ""
    print(f"saved {arguments.output}: differs from the model by at most {difference:.1e}{before}")
