"""The three benchmarks: the annotation files of their releases, and the metadata of their dataset cards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Benchmark:
    """
    A benchmark as released.

    Args:
        title: name in prose.
        about: one or two sentences about its videos and queries.
        homepage: URL of the release.
        license: license of the annotations, as the Hub names it.
        citation: BibTeX.
        clip_seconds: length of a clip of the released features. `None` if clips divide the video's duration equally.
        files: the possible names of each split's annotation file. The first one that exists is read.
        hold_out: share of the training videos that becomes the split `val` if the release has none.
    """

    title: str
    about: str
    homepage: str = ""
    license: str = "other"
    citation: str = ""
    clip_seconds: float | None = None
    files: Mapping[str, Sequence[str]] = field(default_factory=dict)
    hold_out: float | None = None

    @property
    def name(self) -> str:
        """The name in commands and file names."""
        return self.title.lower().replace("-", "_")


QVHIGHLIGHTS = Benchmark(
    title="QVHighlights",
    about="150 s parts of YouTube vlogs and news. A query describes one or several moments.",
    homepage="https://github.com/jayleicn/moment_detr",
    license="cc-by-nc-sa-4.0",
    citation="""
@inproceedings{lei2021detecting,
  title = {Detecting Moments and Highlights in Videos via Natural Language Queries},
  author = {Lei, Jie and Berg, Tamara L. and Bansal, Mohit},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2021}
}
""",
    clip_seconds=2.0,
    files={
        "train": ("highlight_train_release.jsonl",),
        "val": ("highlight_val_release.jsonl",),
        # Its ground truth was released when the evaluation server closed
        "test": ("highlight_test_with_gt.jsonl", "highlight_test_release.jsonl"),
    },
)

CHARADES_STA = Benchmark(
    title="Charades-STA",
    about="Videos of daily activities, about 30 s long. A query describes one moment. The release has no validation "
    "split: 5% of its training videos are held out as `val`, to choose checkpoints. Four training lines end before "
    "they start and are skipped.",
    homepage="https://github.com/jiyanggao/TALL",
    citation="""
@inproceedings{gao2017tall,
  title = {TALL: Temporal Activity Localization via Language Query},
  author = {Gao, Jiyang and Sun, Chen and Yang, Zhenheng and Nevatia, Ram},
  booktitle = {International Conference on Computer Vision},
  year = {2017}
}
""",
    clip_seconds=None,  # VGG has 6 clips per second, SlowFast and CLIP have one
    files={"train": ("charades_sta_train.txt",), "test": ("charades_sta_test.txt",)},
    hold_out=0.05,
)

TACOS = Benchmark(
    title="TACoS",
    about="Cooking videos of 48 to 1,402 s, with about 130 queries each. A query describes one moment.",
    homepage="https://github.com/microsoft/2D-TAN",
    citation="""
@article{regneri2013grounding,
  title = {Grounding Action Descriptions in Videos},
  author = {Regneri, Michaela and Rohrbach, Marcus and Wetzel, Dominikus and Thater, Stefan and Schiele, Bernt and
            Pinkal, Manfred},
  journal = {Transactions of the Association for Computational Linguistics},
  year = {2013}
}
""",
    files={"train": ("train.json",), "val": ("val.json",), "test": ("test.json",)},
)

BENCHMARKS = {benchmark.name: benchmark for benchmark in (QVHIGHLIGHTS, CHARADES_STA, TACOS)}
