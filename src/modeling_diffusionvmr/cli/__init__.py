"""
The `diffusionvmr` command.

Each subcommand is a module in this folder with two functions: `parse(argv)` returns its arguments, and `run(arguments)`
does the work. Modules import torch, and what needs it, only inside `run`, so that `--help` is fast. The exception is
`train`, whose flags come from the training arguments.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from .errors import ending_on_interrupt, run_safely
from .options import CommandParser

COMMANDS = {
    "retrieve": "find the moments of a video that sentences describe",
    "extract": "compute features of videos and sentences",
    "convert": "convert an official release to a folder that datasets.load_dataset opens",
    "train": "train a model, or fine-tune one",
    "evaluate": "score a model with the official metrics",
    "simulate": "make features from annotations alone",
    "plot": "plot predictions beside the truth",
    "export": "write a model for ONNX Runtime",
    "app": "serve a web page on which to search videos",
    "push": "put a checkpoint on the Hub",
}


@ending_on_interrupt()
def main(argv: Sequence[str] | None = None, load_library: Callable[[], None] | None = None) -> None:
    """
    Run a subcommand. Bad input and Ctrl-C end with one line on stderr and a non-zero exit status.

    Args:
        argv: the arguments. Default: those of this process.
        load_library: called between parsing and running, for an entry point that has not executed the package yet.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        _main_parser().parse_args(argv or ["--help"])
    command = importlib.import_module(f".{argv[0]}", __name__)
    arguments = command.parse(argv[1:])
    if load_library is not None:
        load_library()
    run_safely(command.run, arguments)


def _main_parser() -> CommandParser:
    """Return the parser for everything but subcommands. It ends the process with help, the version, or an error."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:{width}}  {purpose}" for name, purpose in COMMANDS.items())
    parser = CommandParser(
        description="Video moment retrieval with DiffusionVMR.",
        epilog=f"commands:\n{lines}\n\n`diffusionvmr COMMAND --help` lists the arguments of a command.",
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("--version", action="version", version=version("modeling_diffusionvmr"))
    return parser
