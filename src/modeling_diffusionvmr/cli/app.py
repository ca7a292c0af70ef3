"""`diffusionvmr app`: a web page on which to search videos."""

import argparse
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence

from ..app.limits import Limits
from .errors import loading
from .options import CommandParser, add_device_argument, add_model_arguments, choose_device, load_model

DEFAULTS = Limits()
LIMITS = (  # name, default, unit, purpose
    ("max_video_seconds", DEFAULTS.max_video_seconds, "S", "refuse longer videos"),
    (
        "max_encoding_seconds",
        DEFAULTS.max_encoding_seconds,
        "S",
        "give up on a video that takes longer to decode and encode",
    ),
    ("max_upload_mb", DEFAULTS.max_upload_bytes // 2**20, "MB", "refuse larger videos"),
    ("concurrency", DEFAULTS.concurrency, "N", "searches at the same time"),
    ("max_waiting", DEFAULTS.max_waiting, "N", "maximum length of the queue"),
    ("keep_minutes", DEFAULTS.keep_seconds // 60, "M", "delete videos that were not used for this long"),
    ("num_examples", 3, "N", "example videos to render"),
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `diffusionvmr app`."""
    parser = CommandParser("app", description="Serve a web page on which to search videos.")
    add_model_arguments(parser)
    add_device_argument(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets other computers in (default: 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, help="port to listen at (default: the first free one from 7860)")
    for name, default, unit, purpose in LIMITS:
        parser.add_argument(
            f"--{name}", type=type(default), default=default, metavar=unit, help=f"{purpose} (default: {default:g})"
        )
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Serve the page until the process is interrupted."""
    from ..checks import check_positive, check_whole

    for name in ("max_video_seconds", "max_encoding_seconds"):
        check_positive(getattr(arguments, name), f"--{name}")
    for name in ("max_upload_mb", "concurrency", "max_waiting", "keep_minutes"):
        check_whole(getattr(arguments, name), f"--{name}", 1)
    check_whole(arguments.num_examples, "--num_examples", 0)
    _check_address(arguments.host, arguments.port)

    from ..app.server import running
    from ..pipeline_diffusionvmr import VideoMomentRetrievalPipeline

    limits = Limits(
        max_video_seconds=arguments.max_video_seconds,
        max_encoding_seconds=arguments.max_encoding_seconds,
        max_upload_bytes=arguments.max_upload_mb * 2**20,
        concurrency=arguments.concurrency,
        max_waiting=arguments.max_waiting,
        keep_seconds=arguments.keep_minutes * 60,
    )
    device = choose_device(arguments.device)
    model, processor = load_model(arguments)
    with loading(model.name_or_path):
        pipeline = VideoMomentRetrievalPipeline(model=model, processor=processor, device=device)
    # Containers are stopped with SIGTERM. Treat it like Ctrl-C, so that visitors' videos are deleted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with running(pipeline, arguments.host, arguments.port, limits, arguments.num_examples) as app:
        print(f"Open {app.url} in a browser. Press Ctrl-C to stop the server.", file=sys.stderr, flush=True)
        threading.Event().wait()


def _check_address(host: str, port: int | None) -> None:
    """Raise `ValueError` if the server cannot listen at an address. Gradio would try a hundred ports."""
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"--port must be from 1 to 65535, got {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            if os.name != "nt":  # there, it means to share the port
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        where = f"--host {host}" + (f" --port {port}" if port else "")
        raise ValueError(f"{where}: cannot listen there ({error.strerror or error})") from error
