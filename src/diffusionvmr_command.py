"""
Entry point of the `diffusionvmr` command.

Importing `modeling_diffusionvmr` registers its classes with `transformers`, which loads torch and takes seconds.
`--help` needs none of that, so the package is only executed after the arguments have been parsed.
"""

import importlib.util
import sys


def main() -> None:
    """Run the command with the arguments of this process."""
    spec = importlib.util.find_spec("modeling_diffusionvmr")
    assert spec is not None and spec.loader is not None  # the package is installed together with this module
    execute = spec.loader.exec_module
    package = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # known, but not executed yet

    from modeling_diffusionvmr.cli import main

    main(load_library=lambda: execute(package))
