"""QVHighlights, as released -> a folder that `datasets.load_dataset` opens."""

from modeling_diffusionvmr.data.conversion import MomentRetrievalBuilder, main


class QVHighlights(MomentRetrievalBuilder):
    TITLE = "QVHighlights"
    ABOUT = (
        "Moments and highlights of 150 s of YouTube vlogs and news that a sentence describes; one or several a query."
    )
    HOMEPAGE = "https://github.com/jayleicn/moment_detr"
    LICENSE = "cc-by-nc-sa-4.0"
    CITATION = """
@inproceedings{lei2021detecting,
  title = {Detecting Moments and Highlights in Videos via Natural Language Queries},
  author = {Lei, Jie and Berg, Tamara L. and Bansal, Mohit},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2021}
}
"""
    CLIP_SECONDS = 2.0
    FILES = {
        "train": ("highlight_train_release.jsonl",),
        "val": ("highlight_val_release.jsonl",),
        # Its ground truth was released when the evaluation server closed
        "test": ("highlight_test_with_gt.jsonl", "highlight_test_release.jsonl"),
    }


if __name__ == "__main__":
    main(QVHighlights)
