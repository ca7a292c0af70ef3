"""
The model card: the README.md that every way of saving a model writes beside it.

The text between two marks in the card is generated. Text outside of the marks and metadata that a person changed are
kept when a card is written again. What cannot be read from the files of the checkpoint (data, settings and results of
the training) is called the facts, a dict of plain values:

    base_model: Hub id of the model that was fine-tuned.
    started_from: what training started from, in words.
    language, license, datasets, tags: values of the metadata.
    train_data: `{"name": str, "split": str, "queries": int, "videos": int, "simulated": bool}`, or the name alone.
    settings, versions: names and values, for tables.
    hardware: what the training ran on.
    seconds: duration of the training. `first_step`: the step that it was resumed from.
    step: number of training steps of the saved weights. `steps`: number of steps of the whole training.
    results: one `{"data": like train_data, "metrics": official names and values, in percent}` per evaluation.
    evaluation: how the model was evaluated, in words.

They are also saved in the card, so that a model that is loaded and saved again has the same ones.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import CardData
from huggingface_hub.repocard import RepoCard
from transformers.utils import cached_file

from .json_files import read_json_object
from .messages import one_line

CARD_NAME = "README.md"
PLACEHOLDER = "FOLDER_OR_ID"  # stands for the model in the usage example until it is pushed
EMBEDDED = "the embedded model of modeling_diffusionvmr"
SIMULATED = "simulated features, made from the annotations without any video"
CLIP_SECONDS = 2.0  # in the usage example, if the backbones state none

# The same text as model_card.md in the repository. It is here since remote code only consists of Python files
TEMPLATE = """\
---
$metadata
---
$before
<!-- begin generated text: replaced when the model is saved or pushed. Text above and below is kept. -->
# $title

Finds the moments of a video that a sentence describes. The model draws random time spans from noise and refines them
into moments, guided by a joint encoding of video and sentence (Zhao et al.,
[arXiv 2308.15109](https://arxiv.org/abs/2308.15109)). This is an independent implementation; the paper's authors
published no code.

## Usage

$usage

## Training

$training

## Results

$results

## Limits

$limits

## Citation

```bibtex
@article{zhao2023diffusionvmr,
  title = {DiffusionVMR: Diffusion Model for Video Moment Retrieval},
  author = {Zhao, Henghao and Lin, Kevin Qinghong and Yan, Rui and Li, Zechao},
  journal = {arXiv preprint arXiv:2308.15109},
  year = {2023}
}
```

<!-- facts: $facts -->
<!-- end generated text -->
$after
"""
# The end is at the start of a line: the name of a dataset may contain the same text
GENERATED = re.compile(r"<!-- begin generated text.*?^<!-- end generated text -->", re.DOTALL | re.MULTILINE)
FACTS = re.compile(r"<!-- facts: (.*?) -->")

VIDEO_USAGE = """\
```python
from transformers import pipeline

retrieve = pipeline("video-moment-retrieval", model="$model", trust_remote_code=True)
retrieve("video.mp4", "a dog jumps into the water")  # [{"start": seconds, "end": seconds, "score": 0 to 1}, ...]
```

Moments come in descending order of their scores. $moments

Videos and sentences are read by the frozen backbones $backbones.

This needs the packages `torch`, `transformers`, `av`, `pillow` and `scipy`. Where `modeling_diffusionvmr` is installed
and imported, omit `trust_remote_code=True`."""

FEATURES_USAGE = """\
```python
import numpy as np
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("$model", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("$model", trust_remote_code=True)

# Replace these by features of a video, one array (clips, size) per backbone, and of a sentence (tokens, size)
video = [np.ones(($clips, size)) for size in $video_sizes]
sentence = np.ones((8, $text_size))
outputs = model(**processor([video], [sentence]))
processor.post_process_moment_retrieval(outputs, covered_durations=[$duration])
```

The result is a list of `{"start", "end", "score"}` per sentence, with times in seconds. This needs the packages
`torch`, `transformers`, `av`, `pillow` and `scipy`. Where `modeling_diffusionvmr` is installed and imported, omit
`trust_remote_code=True`."""


@dataclass
class Card:
    """
    The parts of an existing card.

    Args:
        before, after: text around the generated text.
        metadata: metadata that a person wrote or changed.
        removed: names of generated metadata that a person removed.
        facts: the facts of the generated text.
    """

    before: str = ""
    after: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    facts: dict[str, Any] = field(default_factory=dict)


def write_model_card(model, folder: str | os.PathLike) -> None:
    """
    Write the card of a model that was saved in a folder. If the folder has a card that cannot be read, warn and
    keep it.

    The facts are `model.card_facts`. Without `train_data`, the model was not trained since it was loaded: it also keeps
    the facts of the card that it was loaded beside, and the text that a person wrote there.
    """
    path = Path(folder, CARD_NAME)
    facts = model.card_facts
    try:
        existing = path.read_text(encoding="utf-8") if path.exists() else ""
        if "train_data" not in facts and model.config.name_or_path:
            source = card_beside(model)
            facts, existing = parse_card(source).facts | facts, existing or source
        text = make_card(folder, facts, [existing], tags=model.model_tags or ())
    except ValueError as error:
        warnings.warn(f"{path}: not written: {error}", stacklevel=3)
        return
    path.write_text(text, encoding="utf-8")


def card_beside(model) -> str:
    """Return the text of the card in the folder or repository that a model was loaded from, or "" if there is none."""
    path: str | os.PathLike | None = Path(model.config.name_or_path, CARD_NAME)
    if model.hub_id is not None:
        path = cached_file(
            model.hub_id,
            CARD_NAME,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **model.hub_kwargs,
        )
    return Path(path).read_text(encoding="utf-8") if path is not None and os.path.isfile(path) else ""


def make_card(
    folder: str | os.PathLike,
    facts: Mapping[str, Any],
    existing: Iterable[str] = (),
    model_id: str | None = None,
    tags: Iterable[str] = (),
) -> str:
    """
    Return the card of a checkpoint.

    Args:
        folder: the checkpoint.
        facts: see the top of this module.
        existing: cards whose text and metadata by persons are kept. If several set the same metadata, the first counts.
        model_id: Hub id of the model. Default: a placeholder.
        tags: tags to add to the metadata.

    Raises:
        ValueError: if the metadata of an existing card cannot be read.
    """
    cards = [parse_card(text) for text in existing]
    config = _read_json(Path(folder, "config.json"))
    title = model_id.split("/")[-1] if model_id else "DiffusionVMR"
    generated = _metadata(facts, title, tags)
    removed = set().union(*(card.removed for card in cards))
    metadata = {name: value for name, value in generated.items() if name not in removed}
    for card in reversed(cards):
        metadata |= card.metadata
    record = {"facts": facts, "metadata": {name: _digest(value) for name, value in generated.items()}}
    text = Template(TEMPLATE).substitute(
        metadata=CardData(**metadata).to_yaml(),
        before=_joined([card.before for card in cards]),
        title=title,
        usage=_usage(folder, config, model_id or PLACEHOLDER),
        training=_training(facts),
        results=_results(facts),
        limits=_limits(config, facts),
        facts=json.dumps(record).replace(">", "\\u003e"),  # a ">" could end the comment
        after=_joined([card.after for card in cards]),
    )
    return text.rstrip() + "\n"


def parse_card(text: str) -> Card:
    """Return the parts of a card. Raise ValueError if its metadata is not a YAML mapping."""
    text = text.removeprefix("\ufeff")  # some editors on Windows write it at the start of a file
    if not text.strip():
        return Card()
    metadata = {}
    if text.lstrip().startswith("---"):
        try:
            card = RepoCard(text)
        except Exception as error:  # `yaml` raises its own types
            raise ValueError(f"the metadata of the card cannot be read ({one_line(error)})") from error
        metadata, text = card.data.to_dict(), card.text
    found = GENERATED.search(text)
    if found is None:
        return Card(before=text.strip(), metadata=metadata)
    record = _parse_facts(found[0])
    digests = record["metadata"]
    return Card(
        before=text[: found.start()].strip(),
        after=text[found.end() :].strip(),
        metadata={name: value for name, value in metadata.items() if digests.get(name) != _digest(value)},
        removed=digests.keys() - metadata.keys(),
        facts=record["facts"],
    )


def _parse_facts(generated_text: str) -> dict[str, dict[str, Any]]:
    """Return the facts and the digests of the generated metadata. Both are empty if a person changed their form."""
    found = FACTS.search(generated_text)
    try:
        record = json.loads(found[1]) if found else {}
        record = {name: dict(record.get(name, {})) for name in ("facts", "metadata")}
        # Facts are usable if all that is written from them can be written
        for section in (_training, _results, lambda facts: _limits({}, facts), lambda facts: _metadata(facts, "", ())):
            section(record["facts"])
        return record
    except (ValueError, TypeError, KeyError, AttributeError):
        return {"facts": {}, "metadata": {}}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _joined(texts: Iterable[str]) -> str:
    """Join texts, without those that are part of another one."""
    kept = dict.fromkeys(filter(None, texts))
    return "\n\n".join(text for text in kept if not any(text in other for other in kept if other != text))


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


# Metadata


def _metadata(facts: Mapping[str, Any], title: str, tags: Iterable[str]) -> dict[str, Any]:
    """Return the generated metadata, see https://huggingface.co/docs/hub/model-cards."""
    standard_tags = ["video-moment-retrieval", "temporal-grounding", "diffusion"]
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "video-text-to-text",  # the closest of the tasks that the Hub knows
        "license": facts.get("license", "apache-2.0"),
        "language": facts.get("language", ["en"]),
        "base_model": facts.get("base_model"),
        "datasets": facts.get("datasets"),
        "tags": list(dict.fromkeys([*standard_tags, *facts.get("tags", ()), *tags])),
        "model-index": _model_index(facts, title),
    }
    return {name: value for name, value in metadata.items() if value}


def _model_index(facts: Mapping[str, Any], title: str) -> list[dict[str, Any]] | None:
    results = [
        {
            "task": {"type": "video-moment-retrieval", "name": "Video moment retrieval"},
            "dataset": _dataset_entry(result["data"]),
            "metrics": [{"type": name, "value": value, "name": name} for name, value in result["metrics"].items()],
        }
        for result in facts.get("results", ())
    ]
    return [{"name": title, "results": results}] if results else None


def _dataset_entry(data: Mapping[str, Any]) -> dict[str, str]:
    name = data["name"]
    identifier = re.sub(r"[^\w./-]+", "-", name)  # the Hub only accepts an id, or what looks like one
    entry = {"type": identifier, "name": f"{name} (simulated features)" if data.get("simulated") else name}
    return entry | ({"split": data["split"]} if "split" in data else {})


# Sections


def _usage(folder: str | os.PathLike, config: Mapping[str, Any], model: str) -> str:
    processor = _read_json(Path(folder, "processor_config.json"))
    if _runs_on_video(config):
        return Template(VIDEO_USAGE).substitute(model=model, moments=_moments(processor), backbones=_backbones(config))
    clips = config.get("max_clips", 75)
    return Template(FEATURES_USAGE).substitute(
        model=model,
        clips=clips,
        video_sizes=processor.get("video_feature_sizes", [config.get("video_feature_size", 2816)]),
        text_size=config.get("text_feature_size", 512),
        duration=clips * (_clip_seconds(config) or CLIP_SECONDS),
    )


def _moments(processor: Mapping[str, Any]) -> str:
    """Say which moments the processor returns."""
    top_k, threshold, nms = (processor.get(name) for name in ("top_k", "threshold", "nms_threshold"))
    text = "By default, these are " + ("all candidates" if top_k is None else f"at most {top_k}")
    text += f" with a score of at least {threshold:g}" if threshold else ""
    return text + ("." if nms is None else f", without those that overlap a better one by an IoU above {nms:g}.")


def _backbones(config: Mapping[str, Any]) -> str:
    """Name the backbones, with links to those on the Hub."""
    names = []
    for entry in config["backbones"]:
        identifier, seconds = entry.get("id"), entry.get("clip_seconds")
        link = f"[{identifier}](https://huggingface.co/{identifier})"
        where = link if identifier else f"`{entry['name']}` (included)"
        names.append(where + (f", one clip per {seconds:g} s" if seconds else ""))
    return "; ".join(names)


def _runs_on_video(config: Mapping[str, Any]) -> bool:
    backbones = config.get("backbones") or []
    return bool(backbones) and not _cannot_run(config)


def _cannot_run(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the backbones that are neither in the checkpoint nor on the Hub."""
    return [entry["name"] for entry in config.get("backbones") or [] if not (entry.get("folder") or entry.get("id"))]


def _clip_seconds(config: Mapping[str, Any]) -> float | None:
    lengths = [entry.get("clip_seconds") for entry in config.get("backbones") or []]
    return next((length for length in lengths if length), None)


def _training(facts: Mapping[str, Any]) -> str:
    if not (facts.get("settings") or facts.get("train_data")):
        return "This model was not saved by a training of the library, so its data and settings are not known."
    start = facts.get("started_from", "random weights")
    base = facts.get("base_model")
    parts = [f"Training started from {f'[{base}](https://huggingface.co/{base})' if base else start}."]
    if "train_data" in facts:
        parts[0] += f" Training data: {_described(facts['train_data'])}."
    if "seconds" in facts:
        resumed = f", from step {facts['first_step']}" if facts.get("first_step") else ""
        parts[0] += f" It took {_duration(facts['seconds'])} on {facts['hardware']}{resumed}."
    if "step" in facts:
        of_all = f" of {facts['steps']}" if "steps" in facts else ""
        parts[0] += f" The weights are those after step {facts['step']}{of_all}."
    parts += [_table(header, facts[name]) for name, header in (("settings", "setting"), ("versions", "software"))]
    return "\n\n".join(parts)


def _results(facts: Mapping[str, Any]) -> str:
    if not facts.get("results"):
        return "These weights were not evaluated."
    parts = [facts["evaluation"]]
    for result in facts["results"]:
        parts += [f"On {_described(result['data'])}:", _table("metric", result["metrics"])]
    return "\n\n".join(parts)


def _limits(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    lines = []
    if not config.get("backbones"):
        lines.append("Takes features only: the configuration does not name the backbones that produced them.")
    elif cannot_run := _cannot_run(config):
        lines.append(f"Takes features only: the backbones {', '.join(cannot_run)} cannot be run by this library.")
    clips, seconds = config.get("max_clips", 75), _clip_seconds(config)
    length = f" ({clips * seconds:g} s)" if seconds else ""
    if _runs_on_video(config):
        lines.append(f"A video of more than {clips} clips{length} is searched in windows; long ones have more errors.")
    else:
        lines.append(f"A video of more than {clips} clips{length} is averaged down to {clips}, which is less precise.")
    lines.append("Scores rank the moments of one sentence. They are not calibrated probabilities.")
    if facts.get("started_from") == EMBEDDED:
        lines.append("Training started from a model that only knows rendered shapes: not suited to photographic video.")
    if facts.get("train_data", {}).get("simulated"):
        lines.append(f"Trained on {SIMULATED}: it shows that training works, and cannot search real videos.")
    if any(result["data"].get("simulated") for result in facts.get("results", ())):
        lines.append("The results are on simulated features, and say nothing about a benchmark.")
    return "\n".join(f"- {line}" for line in lines)


def _described(data: Mapping[str, Any]) -> str:
    text = f"{data['name']} ({data['split']})" if "split" in data else data["name"]
    if "queries" in data:
        counts = [(data["queries"], "query", "queries"), (data["videos"], "video", "videos")]
        text += ", " + " on ".join(f"{number} {one if number == 1 else many}" for number, one, many in counts)
    return f"{text} ({SIMULATED})" if data.get("simulated") else text


def _table(header: str, values: Mapping[str, Any]) -> str:
    lines = [f"| {header} | value |", "| --- | --- |"]
    for row in values.items():
        cells = [str(cell).replace("|", "\\|") for cell in row]
        lines.append(f"| {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02} (h:mm:ss)"
