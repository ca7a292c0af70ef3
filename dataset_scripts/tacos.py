"""TACoS, as released with 2D-TAN -> a folder that `datasets.load_dataset` opens."""

from modeling_diffusionvmr.data.conversion import MomentRetrievalBuilder, main


class TACoS(MomentRetrievalBuilder):
    TITLE = "TACoS"
    ABOUT = "One moment a query, in cooking videos of 48 to 1,402 s with some 130 queries each."
    HOMEPAGE = "https://github.com/microsoft/2D-TAN"
    LICENSE = "other"
    CITATION = """
@article{regneri2013grounding,
  title = {Grounding Action Descriptions in Videos},
  author = {Regneri, Michaela and Rohrbach, Marcus and Wetzel, Dominikus and Thater, Stefan and Schiele, Bernt and
            Pinkal, Manfred},
  journal = {Transactions of the Association for Computational Linguistics},
  year = {2013}
}
"""
    CLIP_SECONDS = None
    FILES = {"train": ("train.json",), "val": ("val.json",), "test": ("test.json",)}


if __name__ == "__main__":
    main(TACoS)
