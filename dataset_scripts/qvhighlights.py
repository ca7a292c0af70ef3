"""Convert the official release of QVHighlights; the same as `diffusionvmr convert qvhighlights`."""

import sys

from modeling_diffusionvmr.cli import main

if __name__ == "__main__":
    main(["convert", "qvhighlights", *sys.argv[1:]])
