"""The `diffusionvmr` command."""
