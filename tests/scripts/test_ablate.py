"""`scripts/ablate.py`, on small data, and its copy of the paper's numbers against the paper."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

import ablate as script
from ablation import PAPER, layer_ious, read_curve, selection
from modeling_diffusionvmr.cli import main
from modeling_diffusionvmr.data.features import write_features
from modeling_diffusionvmr.data.files import load_jsonl, save_jsonl
from modeling_diffusionvmr.plotting import plot_curves, save_figure

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SMALL = "--d_model 16 --encoder_layers 1 --decoder_layers 2 --encoder_ffn_dim 16 --decoder_ffn_dim 16 --roi_bins 4 "
SMALL += "--dynamic_size 2 --num_proposals 6 --max_steps 2 --eval_steps 2 --save_steps 2 --logging_steps 1 --use_cpu "
SMALL += "--disable_tqdm --per_device_train_batch_size 4 --dataloader_pin_memory false --nms_threshold 0.9"
ALL = "--tables 1 2 3 4 5 6 --figures 1 3 4 5"


@pytest.fixture(scope="module", autouse=True)
def few_proposals():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "NUM_PROPOSALS", (5, 9))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random features, annotations, and a curve of another model."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, first in (("train", 0), ("val", 12)):
        rows = []
        for qid in range(first, first + 12):
            row = {"qid": qid, "query": f"sentence {qid}", "vid": f"v{qid // 2}", "duration": 30}
            rows.append({**row, "relevant_windows": [[4, 10 + qid % 5], [16, 28]][: 1 + qid % 2]})
            write_features(folder / "text", qid, rng.normal(size=(5, 6)), "last_hidden_state")
            write_features(folder / "clip", row["vid"], rng.normal(size=(15, 4)))
        save_jsonl(rows, folder / f"{split}.jsonl")
    (folder / "curve.csv").write_text("N,mAP@Avg\n5,30.5\n9,29\n20,28.25\n")
    return folder


@pytest.fixture(scope="module")
def ablate(folder):
    """Run the script in-process."""

    def run(arguments: str, output: Path, extra=()) -> None:
        data = ["--annotations", folder / "train.jsonl", "--eval_annotations", folder / "val.jsonl"]
        data += ["--video_features", folder / "clip", "--text_features", folder / "text"]
        command = [*arguments.split(), "--output_dir", output, "--repeats", 2, "--device", "cpu", *data, *extra]
        script.main(script.parse_arguments([*map(str, command), *SMALL.split()]))

    return run


@pytest.fixture(scope="module")
def trainings():
    """The names of the runs that were trained, and errors to raise after or instead of a training, by its name."""
    run, names, after, instead = script.train.run, [], {}, {}

    def recording(arguments):
        name = Path(arguments.output_dir).name
        names.append(name)
        if name in instead:
            raise instead.pop(name)
        run(arguments)
        if name in after:
            raise after.pop(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.train, "run", recording)
        yield names, after, instead


@pytest.fixture(scope="module")
def finished(ablate, trainings, folder, tmp_path_factory):
    """All tables and figures, from a command that was killed once, then had a run that failed, then finished."""
    output = tmp_path_factory.mktemp("ablation") / "out"
    names, after, instead = trainings
    extra = ["--simulated", "--curves", f"Moment-DETR={folder / 'curve.csv'}"]
    after["without_iou_seed0"] = KeyboardInterrupt()  # trained, but not evaluated
    with pytest.raises(KeyboardInterrupt):
        ablate(ALL, output, extra)
    assert names == ["default_seed0", "without_l1_seed0", "without_iou_seed0"]
    assert not list(output.glob("*.csv"))

    instead["stable_seed0"] = RuntimeError("the device is full")
    with pytest.raises(ValueError, match=r"^1 failed:\n.*stable_seed0: RuntimeError: the device is full \(log: .*\)$"):
        ablate(ALL, output, extra)
    assert names[3:] == [f"{name}_seed0" for name in list(script.RUNS)[2:]]
    assert "RuntimeError: the device is full" in (output / "runs" / "stable_seed0" / "log.txt").read_text()
    assert [line["by"] for line in read(output / "table6.csv")] == ["paper", "paper", "ours"]

    ablate(ALL, output, extra)
    assert names[-1] == "stable_seed0" and len(names) == 9  # one was trained again after a failure, one resumed
    return output


def read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def ours(path: Path, **labels: str) -> list[dict[str, str]]:
    return [line for line in read(path) if line["by"] == "ours" and labels.items() <= line.items()]


def test_everything_is_written(finished):
    written = {path.name for path in finished.iterdir() if path.is_file()}
    assert written == {
        *(f"table{number}.csv" for number in range(1, 7)),
        *("figure1.png", "figure3.csv", "figure3.png", "figure4.csv", "figure4.png", "figure5.png"),
    }
    for path in finished.glob("*.png"):
        with Image.open(path) as picture:
            picture.load()
            assert picture.width > 600 and len(np.unique(np.asarray(picture))) > 20
    for path in finished.glob("*.csv"):
        for line in read(path):
            if line["by"] == "ours":
                assert line["simulated features"] == "yes" and line["data"] == "val.jsonl" and line["runs"] == "1"
                nms = "none" if path.name == "figure4.csv" else "0.9"  # it measures spans before NMS
                assert line["NMS"] == nms and int(line["N"]) > 0 and int(line["S"]) > 0
            elif line["by"] == "paper":
                assert line["simulated features"] == "no" and not line.get("N")
    assert not list(finished.glob("runs/*/checkpoint-*"))
    assert not list(finished.rglob(".*"))  # no temporary files


def test_nothing_is_done_twice(ablate, finished, trainings, folder, monkeypatch):
    before = {path: path.read_bytes() for path in finished.glob("*.csv")}
    count = len(trainings[0])
    for name in ("evaluate_model", "layer_ious", "sampling_seconds"):
        monkeypatch.setattr(script, name, None)
    curve = ["--curves", f"Moment-DETR={folder / 'curve.csv'}"]
    ablate(ALL.replace("--figures 1 3 4 5", "--figures 3 4") + " --simulated", finished, curve)
    assert len(trainings[0]) == count
    assert all(path.read_bytes() == before[path] for path in before)


def test_numbers_are_those_of_an_evaluation(finished, folder, tmp_path):
    def independent(run: str, *arguments) -> dict:
        command = ["--model", finished / "runs" / run, "--annotations", folder / "val.jsonl", "--device", "cpu"]
        command += ["--video_features", folder / "clip", "--text_features", folder / "text", "--nms_threshold", "0.9"]
        main(["evaluate", *map(str, command), "--output_dir", str(tmp_path), *arguments])
        metrics = json.loads((tmp_path / "metrics.json").read_text())
        brief = metrics["brief"]
        return {
            "R1@0.5": brief["MR-full-R1@0.5"],
            "R1@0.7": brief["MR-full-R1@0.7"],
            "mAP@0.5": brief["MR-full-mAP@0.5"],
            "mAP@0.75": brief["MR-full-mAP@0.75"],
            "mAP@Avg": brief["MR-full-mAP"],
        }

    ablation = ("R1@0.5", "R1@0.7", "mAP@Avg")
    cases = [
        ("default_seed0", [], "table1.csv", {}, ("R1@0.5", "R1@0.7", "mAP@0.5", "mAP@0.75", "mAP@Avg")),
        ("default_seed0", ["--num_sampling_steps", "4"], "table4.csv", {"sampling steps": "4", "S": "4"}, ablation),
        ("default_seed0", ["--num_proposals", "9"], "figure3.csv", {"proposals": "9", "N": "9"}, ablation),
        ("without_class_seed0", [], "table5.csv", {"loss": "without class"}, ablation),
        ("default_seed0", [], "table5.csv", {"loss": "all terms"}, ablation),
        ("stable_seed0", [], "table6.csv", {"proposals in training": "stable", "N": "6", "S": "1"}, ablation),
    ]
    seen = set()
    for run, arguments, table, labels, columns in cases:
        (line,) = ours(finished / table, **labels)
        expected = independent(run, *arguments)
        assert {column: float(line[column]) for column in columns} == {column: expected[column] for column in columns}
        seen.add(tuple(expected.values()))
    assert len(seen) > 3  # the cases differ


def test_runs_differ_by_their_flags(finished):
    for name in script.RUNS:
        config = AutoModel.from_pretrained(finished / "runs" / f"{name}_seed0").config
        for term in ("l1", "iou", "hinge", "contrastive", "class"):
            assert (getattr(config, f"{term}_loss_coefficient") == 0) == (name == f"without_{term}")
        log = (finished / "runs" / f"{name}_seed0" / "log.txt").read_text()
        assert ("'num_proposals': 1," in log) == (name != "stable")  # of the first step


def test_the_papers_numbers_are_beside_ours(finished):
    lines = read(finished / "table4.csv")
    assert [(line["sampling steps"], line["by"]) for line in lines] == [
        (steps, by) for steps in "12468" for by in ("paper", "ours")
    ]
    for size in (1, 100):
        column = f"seconds (batch {size})"
        for by, device in (("paper", "NVIDIA RTX 3090"), ("ours", "CPU")):
            of_one = [line for line in lines if line["by"] == by]
            assert all(device in line["device"] and float(line[column]) > 0 for line in of_one)
            ratios = [float(line[f"{column} / one step"]) for line in of_one]
            assert ratios[0] == 1
            expected = float(of_one[-1][column]) / float(of_one[0][column])
            assert ratios[-1] == pytest.approx(expected, rel=0.1, abs=0.01)  # the columns are rounded
    assert lines[-2]["seconds (batch 100)"] == "15.063" and lines[-2]["seconds (batch 100) / one step"] == "8.25"
    assert len(ours(finished / "table1.csv")) == 1
    assert not ours(finished / "table2.csv") and not ours(finished / "table3.csv")  # other data
    assert len(read(finished / "table3.csv")) == len(PAPER[3].rows)
    others = [line for line in read(finished / "figure3.csv") if line["by"] == "Moment-DETR"]
    assert [(line["proposals"], line["mAP@Avg"]) for line in others] == [("5", "30.5"), ("9", "29.0"), ("20", "28.25")]


def test_iou_by_layer(finished, folder):
    model = AutoModel.from_pretrained(finished / "runs" / "default_seed0").eval()
    processor = AutoProcessor.from_pretrained(finished / "runs" / "default_seed0")
    own, followed = [], []
    for row in load_jsonl(folder / "val.jsonl"):
        video = np.load(folder / "clip" / f"{row['vid']}.npz")["features"]
        text = np.load(folder / "text" / f"qid{row['qid']}.npz")["last_hidden_state"]
        with torch.no_grad():
            outputs = model(**processor([[video]], [text]))
        scores = outputs.intermediate_logits[0].softmax(-1)[..., 0]

        def best_iou(span, row=row) -> float:
            start, end = (30 * float(np.clip(span[0] + side * span[1] / 2, 0, 1)) for side in (-1, 1))
            ious = []
            for low, high in row["relevant_windows"]:
                both = max(0, min(end, high) - max(start, low))
                ious.append(both / (end - start + high - low - both))
            return max(ious)

        spans = outputs.intermediate_spans[0].numpy()
        own.append([best_iou(spans[layer + 1][scores[layer].argmax()]) for layer in range(2)])
        followed.append([best_iou(layer[scores[-1].argmax()]) for layer in spans])
    for name, first, expected in (("best of the layer", 1, own), ("best of the last layer", 0, followed)):
        lines = ours(finished / "figure4.csv", proposal=name)
        assert [int(line["layer"]) for line in lines] == list(range(first, 3))
        np.testing.assert_allclose([float(line["IoU"]) for line in lines], np.mean(expected, axis=0), atol=2e-4)
    # With more sampling steps in the configuration it is still the refinement from noise
    model.config.num_sampling_steps = 3
    known = json.loads((finished / "runs" / "default_seed0" / "evaluations" / "layers.json").read_text())
    training = script.train.parse(
        ["--annotations", str(folder / "train.jsonl"), "--eval_annotations", str(folder / "val.jsonl")]
        + ["--video_features", str(folder / "clip"), "--text_features", str(folder / "text"), "--output_dir", "out"]
    )
    assert layer_ious(model, script.EvaluationData(training).dataset(processor, model.config)) == known


def test_several_seeds_and_other_flags(ablate, finished, trainings):
    count = len(trainings[0])
    ablate("--tables 6 --seeds 0 1", finished)
    assert trainings[0][count:] == ["default_seed1", "stable_seed1"]
    (line,) = ours(finished / "table6.csv", **{"proposals in training": "stable"})
    values = [
        json.loads((finished / "runs" / f"stable_seed{seed}" / "metrics.json").read_text())["brief"]["MR-full-mAP"]
        for seed in (0, 1)
    ]
    assert line["runs"] == "2" and line["simulated features"] == "no"
    assert float(line["mAP@Avg"]) == pytest.approx(np.mean(values), abs=0.006)
    assert [float(line[f"mAP@Avg {name}"]) for name in ("min", "max")] == [min(values), max(values)]
    with pytest.raises(ValueError, match="default_seed0: made with other flags"):
        ablate("--tables 6", finished, ["--learning_rate", "0.5"])
    assert len(trainings[0]) == count + 2


def test_results_of_other_runs(finished, tmp_path):
    metrics = [finished / "runs" / f"{name}_seed0" / "metrics.json" for name in ("default", "stable")]
    given = [f"A={metrics[0]}", f"A={metrics[1]}", f"B={metrics[1]}"]
    command = ["--tables", "2", "--output_dir", str(tmp_path), "--device", "cpu", "--results", *given]
    script.main(script.parse_arguments(command))  # needs no data
    first, second = ours(tmp_path / "table2.csv")
    assert (first["method"], first["runs"], second["method"], second["runs"]) == ("A", "2", "B", "1")
    values = [json.loads(path.read_text())["brief"]["MR-full-R1@0.5"] for path in metrics]
    assert float(first["R1@0.5"]) == pytest.approx(np.mean(values), abs=0.006)
    assert float(second["R1@0.5"]) == values[1]
    assert [path.name for path in tmp_path.iterdir()] == ["table2.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tables 6 --seed 3", "--seed: use --seeds instead"),
        ("--tables 5 --l1_loss_coefficient=2", "--l1_loss_coefficient: cannot be used, since the runs differ in it"),
        ("--tables 6 --proposal-schedule stable", "--proposal_schedule: cannot be used, since the runs differ in it"),
        ("--figures 5 --qids 12 3", "--qids: no qid 3 in val.jsonl"),
        ("--figures 3 --curves {folder}/curve.csv", "--curves: must be NAME=FILE"),
        ("--figures 3 --curves A={folder}/val.jsonl", "val.jsonl, line 2: needs the columns `N` and `mAP@Avg`"),
        ("--tables 1 2 --results A={folder}/metrics.json", "--tables: only one of 1, 2 and 3"),
        ("--tables 1 --results A={folder}/broken.json", "broken.json: not the metrics of `diffusionvmr evaluate`"),
        ("--tables 1 --results A={folder}/val.jsonl", "val.jsonl: not JSON"),
        ("--tables 4 --repeats 0", "--repeats must be above 0, got 0"),
    ],
)
def test_bad_input(ablate, folder, tmp_path, trainings, arguments, message):
    (folder / "metrics.json").write_text('{"brief": {}}')
    (folder / "broken.json").write_text("[]")
    count = len(trainings[0])
    with pytest.raises(ValueError, match=re.escape(message)):
        ablate("", tmp_path / "out", arguments.format(folder=folder).split())
    assert len(trainings[0]) == count and not (tmp_path / "out").exists()


def test_unknown_flag(ablate, tmp_path, capsys):
    with pytest.raises(SystemExit):
        ablate("--tables 4 --learnin_rate 1", tmp_path / "out")
    assert "unknown flag --learnin_rate; did you mean --learning_rate?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line(tmp_path):
    command = [sys.executable, SCRIPTS / "ablate.py", "--tables", "1", "--results", "A=absent.json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode != 0 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ") and "absent.json" in result.stderr


def test_curves(tmp_path):
    curves = {"ours": {5: [1.0, 3.0], 10: [2.0, 2.0]}, "other": {5: [4.0], 20: [5.0]}}
    figure = plot_curves(curves, "proposals", "mAP", "first line\nsecond line")
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["ours", "other"]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[5, 2], [10, 2]])
    np.testing.assert_array_equal(axes.lines[1].get_xydata(), [[5, 4], [20, 5]])
    assert len(axes.collections) == 1  # a band where there are several runs
    assert axes.get_xticks().tolist() == [5, 10, 20] and axes.get_title("left") == "first line\nsecond line"
    save_figure(figure, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        picture.load()


def test_selection():
    rows = [{"relevant_windows": [[0, 10], [20, 30]]}, {"relevant_windows": [[0, 4]]}]
    windows = [[[20, 25, 0.9], [0, 10, 0.5]], [[6, 8, 0.8], [1, 5, 0.7]]]
    predictions = [{"pred_relevant_windows": of_row} for of_row in windows]
    # The first query: the best proposal is the truth, the chosen one half of it. The second: 3 of 5, and no overlap
    expected = {"best IoU": (1 + 0.6) / 2, "chosen IoU": 0.25, "chosen / true width": 0.5}
    assert selection(predictions, rows) == pytest.approx(expected)
    assert selection(predictions[1:], rows[1:])["chosen / true width"] is None


def test_read_curve(folder, tmp_path):
    assert read_curve(folder / "curve.csv") == {5: 30.5, 9: 29, 20: 28.25}
    (tmp_path / "bad.csv").write_text("N,mAP@Avg\n5,1\n10\n")
    with pytest.raises(ValueError, match=r"bad\.csv, line 3"):
        read_curve(tmp_path / "bad.csv")


def test_numbers_are_the_papers(shared):
    """Every row is, number for number, a line of the paper after the title of its table."""
    text = (shared / "paper" / "diffusionvmr_2308.15109v1.txt").read_text()
    for number, table in PAPER.items():
        after = text[re.search(rf"^\W*Table {number}:", text, re.MULTILINE).end() :]
        lines = []
        for line in after.splitlines():
            cells = re.sub(r"</?\w+>", "", line).removesuffix("\t").split("\t")
            numbers = [cell.lstrip("w") for cell in cells if re.fullmatch(r"w?[\d.]+|-", cell)]  # "w": one is misread
            lines.append((cells[0], tuple(None if cell == "-" else float(cell) for cell in numbers)))
        for label, figures in table.rows.items():
            expected = (float(label), *figures) if number == 4 else figures
            found = [name for name, numbers in lines if numbers == expected]
            assert found, (number, label)
            if number in (1, 2, 3):
                assert any(
                    re.sub(r"\W", "", name).startswith(re.sub(r"\W", "", label.split(" (")[0])) for name in found
                )
