"""Convert the official release of Charades-STA; the same as `diffusionvmr convert charades_sta`."""

import sys

from modeling_diffusionvmr.cli import main

if __name__ == "__main__":
    main(["convert", "charades_sta", *sys.argv[1:]])
