"""Charades-STA, as released -> a folder that `datasets.load_dataset` opens."""

from pathlib import Path

from modeling_diffusionvmr.data.annotations import hold_out
from modeling_diffusionvmr.data.conversion import MomentRetrievalBuilder, main

VAL_SHARE = 0.05


class CharadesSTA(MomentRetrievalBuilder):
    TITLE = "Charades-STA"
    ABOUT = (
        "One moment a query, in videos of about 30 s of daily activities. The release has no validation split: "
        f"{VAL_SHARE:.0%} of its training videos are held out as `val`, for choosing checkpoints. "
        "Four training lines end before they start and are left out."
    )
    HOMEPAGE = "https://github.com/jiyanggao/TALL"
    LICENSE = "other"
    CITATION = """
@inproceedings{gao2017tall,
  title = {TALL: Temporal Activity Localization via Language Query},
  author = {Gao, Jiyang and Sun, Chen and Yang, Zhenheng and Nevatia, Ram},
  booktitle = {International Conference on Computer Vision},
  year = {2017}
}
"""
    CLIP_SECONDS = None  # VGG has 6 clips a second, SlowFast and CLIP one
    FILES = {"train": ("charades_sta_train.txt",), "test": ("charades_sta_test.txt",)}

    @classmethod
    def splits(cls, folder: Path, skip_invalid: bool):
        rows = super().splits(folder, skip_invalid)
        train, val = hold_out(rows["train"], VAL_SHARE)
        return {"train": train, "val": val, "test": rows["test"]}


if __name__ == "__main__":
    main(CharadesSTA)
