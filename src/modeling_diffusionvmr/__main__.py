"""`python -m modeling_diffusionvmr` is the `diffusionvmr` command."""

from .cli import main

if __name__ == "__main__":
    main()
