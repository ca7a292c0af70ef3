import numpy as np
import pytest
import torch
from PIL import Image

from modeling_diffusionvmr.plotting import TRUE, plot_curves, plot_refinement, plot_timeline, save_figure

QUERIES = ["a red dog", "a dog runs"]
RESULTS = [
    {
        "moments": [{"start": 2.0, "end": 5.5, "score": 0.9}, {"start": 8.0, "end": 8.0, "score": 0.2}],
        "saliency": [0.1, 0.9, 0.8, -0.4, 0.0],
        "clip_seconds": 2.0,
    },
    {"moments": [], "saliency": [0.5], "clip_seconds": 10.0},
]
TRUTH = [[[2.0, 6.0], [8.0, 9.0]], []]
FRAMES = [np.full((24, 32, 3), 60 * index, np.uint8) for index in range(4)]


def bars(axes) -> list[tuple]:
    """(start, width) of each bar."""
    return [(round(bar.get_x(), 3), round(bar.get_width(), 3)) for bar in axes.patches]


def is_whole(path) -> bool:
    with Image.open(path) as picture:
        picture.load()  # fails for a truncated file
        return picture.width > 300 and picture.height > 100 and len(np.unique(np.asarray(picture))) > 20


@pytest.mark.parametrize("truth", [None, TRUTH])
def test_timeline(tmp_path, truth):
    figure = plot_timeline(QUERIES, RESULTS, 10.0, FRAMES, truth)
    first, second, strip = figure.axes
    assert bars(first) == [(2, 3.5), (8, 0)] + ([(2, 4), (8, 1)] if truth else [])
    assert bars(second) == []
    np.testing.assert_allclose(first.lines[0].get_xdata(), [1, 3, 5, 7, 9])
    centered = np.array(RESULTS[0]["saliency"]) - 0.28
    np.testing.assert_allclose(first.lines[0].get_ydata(), 1 / (1 + np.exp(-centered)))
    assert [text.get_text() for text in first.texts] == ["0.90", "0.20"]
    assert [text.get_text() for text in second.texts] == ["no moment found"]
    labels = [text.get_text() for text in first.get_legend().get_texts()]
    assert labels[0] == "saliency (a ranking, not a probability)"
    assert [axes.get_title("left") for axes in (first, second)] == [f"“{query}”" for query in QUERIES]
    assert len(strip.images) == 4 and all(axes.get_xlim() == (0, 10) for axes in figure.axes)
    save_figure(figure, tmp_path / "timeline.png")
    assert is_whole(tmp_path / "timeline.png")
    assert [path.name for path in tmp_path.iterdir()] == ["timeline.png"]


def test_two_hours(tmp_path):
    """A moment of 4 s is visible, scores do not overlap, and the highest clip is not averaged away."""
    saliency = np.zeros(3600)
    saliency[1000] = 20
    moments = [{"start": 4000 + i * 20, "end": 4004 + i * 20, "score": 0.9 - i / 100} for i in range(3)]
    result = {"moments": moments, "saliency": saliency.tolist(), "clip_seconds": 2.0}
    figure = plot_timeline(["a red dog"], [result], 7200.0, FRAMES)
    panel = figure.axes[0]
    (curve,) = panel.lines
    assert len(curve.get_xdata()) <= 1000 and curve.get_ydata().max() > 0.99
    assert curve.get_xdata()[curve.get_ydata().argmax()] == pytest.approx(2001, abs=8)
    assert [text.get_text() for text in panel.texts] == ["0.90"]  # the best of three within a minute
    assert bars(panel) == [(4000, 4), (4020, 4), (4040, 4)]
    labels = [label.get_text() for label in panel.get_xticklabels()]
    assert labels == ["00:00", "10:00", *(f"{minutes}:00" for minutes in (20, 30, 40, 50)), *labels[6:]]
    assert labels[6:] == [f"{hours}:{minutes:02d}:00" for hours in (1,) for minutes in range(0, 60, 10)] + ["2:00:00"]
    save_figure(figure, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    red = (pixels[..., 0] > 180) & (pixels[..., 1] < 140) & (pixels[..., 2] < 150)
    # Columns with a whole bar. The legend is less high, and so is a bar that is narrower than a pixel.
    assert (red.sum(0) >= 14).sum() >= 3


@pytest.mark.parametrize("truth", [None, [[10.0, 40.0]]])
def test_refinement(tmp_path, truth):
    spans = torch.tensor([[[0.5, 0.2], [0.1, 0.4]], [[0.5, 0.4], [0.3, 0.2]], [[0.5, 0.5], [0.25, 0.3]]])
    figure = plot_refinement(spans.bfloat16(), torch.tensor([0.9, 0.2]), 100.0, truth, "refined")
    assert [axes.get_ylabel() for axes in figure.axes] == ["noise", "layer 1", "layer 2"]
    assert figure.axes[0].get_title("left") == "refined"
    shown = [bar for bar in bars(figure.axes[-1]) if bar != (10, 30) or truth is None]
    np.testing.assert_allclose(shown, [(10, 30), (25, 50)][-len(shown) :], atol=0.3)  # the best one on top
    np.testing.assert_allclose(bars(figure.axes[0])[-2:], [(0, 30), (40, 20)], atol=0.3)  # clamped to the video
    better, worse = (bar.get_facecolor() for bar in figure.axes[-1].patches[-2:])
    assert better != worse  # colors show scores
    bands = [patch for patch in figure.axes[0].patches if patch.get_facecolor()[:3] == pytest.approx(rgb(TRUE))]
    assert len(bands) == (1 if truth else 0)
    save_figure(figure, str(tmp_path / "refinement.png"))
    assert is_whole(tmp_path / "refinement.png")


def rgb(color: str) -> tuple:
    return tuple(int(color[index : index + 2], 16) / 255 for index in (1, 3, 5))


@pytest.mark.parametrize(
    "text", ["from $5 to $10", "$x_{$", r"sign: \frac $\frac$", "犬 \x1b \x00 ^_{", "\ud800", "a" * 500]
)
@pytest.mark.filterwarnings("ignore:Glyph")  # of characters that the default font lacks
def test_any_text_can_be_drawn(tmp_path, text):
    result = {"moments": [], "saliency": [0.1] * 5, "clip_seconds": 2.0}
    spans, scores = torch.full((2, 1, 2), 0.5), torch.tensor([0.5])
    for index, figure in enumerate(
        [
            plot_timeline([text], [result], 10.0, FRAMES),
            plot_refinement(spans, scores, 10.0, None, text),
            plot_curves({text[:40]: {1: [1, 2], 2: [3]}}, text[:40], text[:40], text),
        ]
    ):
        save_figure(figure, tmp_path / f"{index}.png")
        assert is_whole(tmp_path / f"{index}.png")


def test_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="doc"):
        save_figure(plot_timeline(QUERIES, RESULTS, 10.0, FRAMES), tmp_path / "timeline.doc")
    assert not list(tmp_path.iterdir())


def test_failed_write_keeps_the_old_picture(tmp_path):
    path = tmp_path / "timeline.png"
    path.write_bytes(b"old")
    figure = plot_timeline(QUERIES, RESULTS, 10.0, FRAMES)

    def breaks(file, **options):
        with open(file, "wb") as half:
            half.write(b"half")
        raise OSError("the disk is full")

    figure.savefig = breaks
    with pytest.raises(OSError, match="disk is full"):
        save_figure(figure, path)
    assert path.read_bytes() == b"old"
    assert [other.name for other in tmp_path.iterdir()] == ["timeline.png"]  # no partial file is left
