"""Ways to damage a checkpoint folder, shared by the tests of commands that load one."""

import json
from pathlib import Path


def cut_off(model: Path) -> None:
    """Leave only the beginning of the weights."""
    with open(model / "model.safetensors", "r+b") as file:
        file.truncate(1000)


def other_sizes(model: Path) -> None:
    """Make the configuration describe a larger model than the weights."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "d_model": 2 * config["d_model"]}))
