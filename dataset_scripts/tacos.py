"""Convert the official release of TACoS; the same as `diffusionvmr convert tacos`."""

import sys

from modeling_diffusionvmr.cli import main

if __name__ == "__main__":
    main(["convert", "tacos", *sys.argv[1:]])
