"""`diffusionvmr push`: put a checkpoint on the Hub."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..messages import one_line
from .errors import loading
from .options import CommandParser, check_model_type


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `diffusionvmr push`."""
    parser = CommandParser(
        "push",
        description="Put a checkpoint on the Hub: weights, configuration, processor, backbones, code and model card,\n"
        "in one commit. Text that you wrote in the card is kept. Log in first with `hf auth login`, or set HF_TOKEN.",
    )
    parser.add_argument("folder", help="checkpoint to push, for example the output folder of a training")
    parser.add_argument("repository", metavar="USER/NAME", help="repository on the Hub; created if missing")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to; created if missing (default: main)")
    parser.add_argument("--message", default="Upload model", help="title of the commit (default: Upload model)")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Load the checkpoint, so that only a complete one is pushed, and push it."""
    from .. import DiffusionVMRForMomentRetrieval
    from ..checkpoint import check_backbones
    from ..configuration_diffusionvmr import HUB_ID
    from ..weights import check_weights

    folder = Path(arguments.folder)
    if not HUB_ID.fullmatch(arguments.repository):
        raise ValueError(f"{arguments.repository}: a repository on the Hub is USER/NAME")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: not a checkpoint: no config.json")
    check_model_type(str(folder))
    with loading(str(folder)):
        model = DiffusionVMRForMomentRetrieval.from_pretrained(folder)
        check_weights(model, model.missing_weights, folder)
        check_backbones(model.config, folder)
    with pushing(arguments.repository):
        url = model.push_to_hub(
            arguments.repository,
            private=arguments.private or None,
            revision=arguments.revision,
            commit_message=arguments.message,
        )
    print(f"pushed to {url}")


@contextmanager
def pushing(repository: str) -> Iterator[None]:
    """Turn errors of the connection into a one-line `OSError` that names the repository and says what to do."""
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        refused = error.response is not None and error.response.status_code in (401, 403)
        advice = "; log in with `hf auth login` or set HF_TOKEN, with a token that may write there" if refused else ""
        raise OSError(f"{repository}: {ENDPOINT} refused the push ({one_line(error)}){advice}") from error
    except Exception as error:
        if not type(error).__module__.startswith("http"):  # the HTTP library of huggingface_hub has changed its name
            raise
        raise OSError(f"{repository}: {ENDPOINT} cannot be reached ({one_line(error)})") from error
