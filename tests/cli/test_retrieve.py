"""`diffusionvmr retrieve`, with the embedded model on a rendered video."""

import base64
import json
import shutil
import sys

import pytest
from PIL import Image

from damaged import cut_off, other_sizes
from modeling_diffusionvmr import DEFAULT_MODEL, DiffusionVMRProcessor
from modeling_diffusionvmr.cli import main, options
from modeling_diffusionvmr.synthetic.rendered_world import plan_video, write_video
from modeling_diffusionvmr.video_file import VideoFile

PLAN = plan_video(3)
QUERIES = ["a red circle", "two yellow triangles"]
EVERYTHING = ("--threshold", 0, "--nms_threshold", 1, "--top_k", 100)  # instead of what is saved with the model


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "video.mp4"
    write_video(PLAN, path)
    return path


@pytest.fixture
def retrieve(video, capsys):
    """Run the command on the video; return what it prints to stdout."""

    def run(*arguments) -> str:
        capsys.readouterr()
        main(["retrieve", str(video), *map(str, arguments)])
        return capsys.readouterr().out

    return run


def test_json_and_plot(retrieve, tmp_path):
    found = json.loads(retrieve(*QUERIES, "--json", *EVERYTHING, "--top_k", 2, "--plot", tmp_path / "out.png"))
    assert [entry["query"] for entry in found] == QUERIES
    assert all(len(entry["moments"]) == 2 for entry in found)
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width > 300


def test_text_shows_the_same_moments(retrieve):
    options = (*EVERYTHING, "--top_k", 3, "--num_proposals", 7, "--num_sampling_steps", 2)
    lines = retrieve(*QUERIES, *options).splitlines()
    expected = []
    for entry in json.loads(retrieve(*QUERIES, *options, "--json")):
        expected += [[], [entry["query"]], ["start", "end", "score"]]
        for moment in entry["moments"]:
            times = [divmod(round(moment[side], 1), 60) for side in ("start", "end")]
            times = [f"{int(minutes):02d}:{seconds:04.1f}" for minutes, seconds in times]
            expected.append([*times, f"{moment['score']:.3f}"])
    assert [line.split() if line.startswith("  ") else [line] if line else [] for line in lines] == expected[1:]
    assert len(lines) == 11 and len({len(line) for line in lines if line.startswith("  ")}) == 1  # aligned


def test_windows(retrieve):
    """The video is of more clips than a window has."""
    whole, in_windows = (
        json.loads(retrieve(QUERIES[0], "--json", *options)) for options in ([], ["--chunk_length_s", 30])
    )
    assert len(whole[0]["saliency"]) == len(in_windows[0]["saliency"])
    assert whole[0]["saliency"] != in_windows[0]["saliency"]


def test_filters(retrieve):
    (entry,) = json.loads(retrieve(QUERIES[0], "--json", *EVERYTHING))
    scores = [moment["score"] for moment in entry["moments"]]
    assert len(scores) == 20
    (filtered,) = json.loads(retrieve(QUERIES[0], "--json", *EVERYTHING, "--threshold", scores[1]))
    assert filtered["moments"] == entry["moments"][: scores.index(scores[1]) + 1]
    (distinct,) = json.loads(retrieve(QUERIES[0], "--json", *EVERYTHING, "--nms_threshold", 0.1))
    assert 1 <= len(distinct["moments"]) < len(scores)


def test_defaults_are_those_of_the_checkpoint(retrieve, tmp_path):
    folder = shutil.copytree(DEFAULT_MODEL, tmp_path / "model")
    query = PLAN.queries[0].text
    (every,) = json.loads(retrieve(query, "--json", *EVERYTHING))
    for top_k in (7, 3):
        processor = DiffusionVMRProcessor.from_pretrained(folder)
        processor.threshold, processor.nms_threshold, processor.top_k = 0.0, None, top_k
        processor.save_pretrained(folder)
        (found,) = json.loads(retrieve(query, "--json", "--model", folder))
        assert found["moments"] == every["moments"][:top_k]


def test_nothing_found(retrieve):
    first, second = QUERIES
    assert retrieve(*QUERIES, "--threshold", 1) == f"{first}\n  no moment found\n\n{second}\n  no moment found\n"


def test_page_and_files(video, retrieve, tmp_path, capsys):
    options = (*EVERYTHING, "--top_k", 2, "--html", tmp_path / "new" / "out.html", "--cut", tmp_path / "cut")
    found = json.loads(retrieve(*QUERIES, "--json", *options))
    page = (tmp_path / "new" / "out.html").read_text(encoding="utf-8")
    assert base64.b64encode(video.read_bytes()).decode() in page
    files = sorted((tmp_path / "cut").iterdir())
    moments = [moment for entry in found for moment in entry["moments"]]
    assert [file.name[:16] for file in files] == [
        *("01-01_a-red-circ", "01-02_a-red-circ", "02-01_two-yellow", "02-02_two-yellow")
    ]
    for file, moment in zip(files, moments):
        assert f'data-start="{moment["start"]:.3f}" data-end="{moment["end"]:.3f}"' in page
        assert VideoFile(file).end == pytest.approx(moment["end"] - moment["start"], abs=0.01)


def test_nothing_to_cut(retrieve, tmp_path):
    retrieve(QUERIES[0], "--threshold", 1, "--cut", tmp_path / "cut", "--html", tmp_path / "out.html")
    assert "No moment found." in (tmp_path / "out.html").read_text(encoding="utf-8")
    assert not (tmp_path / "cut").exists()


def test_url(video, retrieve, video_server, tmp_path, capsys):
    expected = retrieve(*QUERIES)
    video_server.files["a.mp4"] = video.read_bytes()
    outputs = [
        "--plot",
        str(tmp_path / "out.png"),
        "--html",
        str(tmp_path / "out.html"),
        "--cut",
        str(tmp_path / "cut"),
    ]
    main(["retrieve", video_server.url("plain/a.mp4"), *QUERIES, *outputs])
    printed = capsys.readouterr()
    assert printed.out == expected
    assert "downloading: 100%" in printed.err
    assert len(video_server.requested) == 1  # what is saved reads the same download
    assert (tmp_path / "out.png").stat().st_size > 1000
    assert "<title>Moments in a.mp4</title>" in (tmp_path / "out.html").read_text(encoding="utf-8")
    assert len(list((tmp_path / "cut").glob("*.mp4"))) == expected.count(":") // 2
    main(["retrieve", video.as_uri(), *QUERIES])
    assert capsys.readouterr().out == expected


def test_url_without_a_video(error_of, video_server):
    url = video_server.url("plain/absent.mp4")
    assert error_of("retrieve", url, "a red circle") == f"error: {url}: the server answered 404 (Not Found)"


def test_query_with_dollar_signs(retrieve, tmp_path):
    retrieve("from $5 to $10 $x_{$", "--plot", tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 1000


@pytest.mark.parametrize("name, content", [("absent.mp4", None), ("text.mp4", b"no video"), ("empty.mp4", b"")])
def test_not_a_video(error_of, tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert name in error_of("retrieve", tmp_path / name, "a red circle", "--plot", tmp_path / "out.png")
    assert not list(tmp_path.glob("*.png"))


def test_folder_is_not_a_video(error_of, tmp_path):
    assert str(tmp_path) in error_of("retrieve", tmp_path, "a red circle")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([" "], "a query must be"),
        (["a dog", "--model", "a/b/c"], "a/b/c: not a local folder or a valid Hub id"),
        (["a dog", "--model", __file__], "a checkpoint must be a folder, not a file"),
        (["a dog", "--model", f"{DEFAULT_MODEL}/clip"], "a model of type clip, not diffusionvmr"),
        (["a dog", "--num_sampling_steps", "9999"], "num_sampling_steps"),
        (["a dog", "--chunk_length_s", "-1"], "`chunk_length_s` must be a number above 0"),
        (["a dog", "--chunk_length_s", "20", "--stride_length_s", "10"], "`stride_length_s` must be less than half of"),
        (["a dog", "--max_video_seconds", "5"], "the limit is 5 s (`max_video_seconds`)"),
    ],
)
def test_bad_arguments(video, error_of, tmp_path, arguments, message):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    assert message.format(tmp=tmp_path) in error_of("retrieve", video, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--top_k", "-1"], "top_k"),
        (["--threshold", "nan"], "threshold"),
        (["--nms_threshold", "-0.5"], "nms_threshold"),
        (["--num_proposals", "0"], "num_proposals"),
        (["--num_sampling_steps", "-3"], "num_sampling_steps"),
        (["--plot", "{tmp}/out.xyz"], "--plot {tmp}/out.xyz: the extension must be one of "),
        (["--plot", "{tmp}"], "--plot {tmp}: a folder, not a file"),
        (["--plot", ""], "--plot"),
        (["--plot", "/proc/out.png"], "--plot /proc/out.png: cannot write to /proc"),
        (["--html", "{tmp}/out.mp4"], "--html {tmp}/out.mp4: the extension must be .html or .htm"),
        (["--html", "/proc/out.html"], "--html /proc/out.html: cannot write to /proc"),
        (["--cut", __file__], "--cut {file}: {file} is a file, not a folder"),
        (["--plot", "{tmp}/absent/out.png"], "--plot {tmp}/absent/out.png: there is no folder {tmp}/absent"),
    ],
)
def test_flags_are_checked_before_the_work(video, error_of, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(options, "resolve_model", lambda _: pytest.fail("the model is loaded"))
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    assert message.format(tmp=tmp_path, file=__file__) in error_of("retrieve", video, "a dog", *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut_off, "weights are damaged or cut off"),
        (other_sizes, "the sizes in its config.json do not fit its weights"),
        (lambda model: (model / "config.json").write_text("[]"), "config.json: must be a JSON object"),
        (lambda model: (model / "clip" / "config.json").write_text("[]"), "clip/config.json: must be a JSON object"),
        (lambda model: cut_off(model / "clip"), "weights are damaged or cut off"),
    ],
    ids="cut_off other_sizes list_config list_backbone_config cut_off_backbone".split(),
)
def test_damaged_checkpoint(video, error_of, tmp_path, damage, message):
    shutil.copytree(DEFAULT_MODEL, tmp_path / "model")
    damage(tmp_path / "model")
    error = error_of("retrieve", video, "a red circle", "--model", tmp_path / "model")
    assert str(tmp_path / "model") in error and message in error


def test_plot_without_matplotlib(video, tmp_path, monkeypatch, error_of, capsys):
    """It is in an extra, which the error names before the work begins."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "modeling_diffusionvmr.plotting", raising=False)
    monkeypatch.delattr("modeling_diffusionvmr.plotting", raising=False)
    error = error_of("retrieve", video, QUERIES[0], "--plot", tmp_path / "out.png")
    assert "matplotlib" in error and error.endswith("pip install 'modeling_diffusionvmr[train]'")
    assert capsys.readouterr().out == error + "\n"


def test_missing_video_is_noticed_before_the_model_is_loaded(error_of, monkeypatch):
    monkeypatch.setattr("modeling_diffusionvmr.cli.retrieve.load_model", None)
    assert error_of("retrieve", "absent.mp4", "a red circle") == "error: absent.mp4: no such file"
