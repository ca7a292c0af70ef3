"""The guide docs/how_to/fine_tune_on_your_own_videos.md, run from its first block to its last."""

import re
import shlex
from pathlib import Path

import pytest

from hub_server import TOKENS, running_hub
from test_hub import run

GUIDE = Path(__file__).parents[1] / "docs" / "how_to" / "fine_tune_on_your_own_videos.md"
REPOSITORY = "user/guide"


def blocks() -> list[tuple[str, str]]:
    """Return the language and the content of each block of the guide."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def follow() -> dict:
    """Run the guide in the current folder, in another process. Return what it leaves."""
    from modeling_diffusionvmr.cli import main
    from modeling_diffusionvmr.data.files import load_jsonl

    names: dict = {}
    commands = []
    for language, content in blocks():
        if language == "python":
            exec(content, names)
        elif not content.startswith("{"):  # lines of JSONL
            for line in content.replace("\\\n", " ").splitlines():
                program, *arguments = shlex.split(line.replace("USER/NAME", REPOSITORY))
                assert program == "diffusionvmr"
                commands.append(arguments[0])
                main(arguments)
    moments = names["retrieve"]("new.mp4", "a purple circle beside a black circle")
    rows = {name: sum(1 for _ in load_jsonl(f"{name}.jsonl")) for name in ("train", "val")}
    return {"commands": commands, "rows": rows, "moments": moments}


@pytest.fixture(scope="module")
def hub():
    with running_hub() as server:
        yield server


def test_the_guide_works_as_written(hub, tmp_path):
    (token,) = [token for token, user in TOKENS.items() if user == REPOSITORY.partition("/")[0]]
    code = "import test_fine_tuning_guide; found = test_fine_tuning_guide.follow()"
    found = run(hub, tmp_path, code, HF_TOKEN=token)
    assert found["commands"] == ["extract", "extract", "train", "train", "evaluate", "retrieve", "push"]
    assert found["rows"] == {"train": 10, "val": 3}
    (moment,) = found["moments"]  # true from 21.05 s to 29.54 s
    assert abs(moment["start"] - 21.05) < 1.5 and abs(moment["end"] - 29.54) < 1.5
    pushed = hub.model(REPOSITORY).files()
    assert {"README.md", "model.safetensors", "processor_config.json", "clip/model.safetensors"} <= pushed.keys()
    card = pushed["README.md"].decode()
    assert "MR-full-mAP" in card and str(tmp_path) not in card
