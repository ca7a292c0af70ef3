"""The `diffusionvmr` command: its subcommands, their help, and bad input."""

import subprocess
import sys
from importlib.metadata import version

import pytest

from modeling_diffusionvmr.cli import COMMANDS, main

# Enters as the installed command does, and reports which heavy modules were loaded
HELP = """
import sys
from diffusionvmr_command import main

sys.argv = ["diffusionvmr", *sys.argv[1:]]
try:
    main()
finally:
    heavy = ("torch", "transformers", "datasets", "pandas", "av", "evaluate", "matplotlib", "h5py")
    print("loaded:", *(name for name in heavy if name in sys.modules))
"""


@pytest.mark.parametrize("command", [None, *(command for command in COMMANDS if command != "train")])
def test_help_loads_no_heavy_module(command, tmp_path):
    arguments = ["--help"] if command is None else [command, "--help"]
    result = subprocess.run(
        [sys.executable, "-c", HELP, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    *shown, loaded = result.stdout.splitlines()
    assert shown[0].startswith(f"usage: {' '.join(['diffusionvmr', *arguments[:-1]])} ")
    assert loaded == "loaded:"


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"usage: diffusionvmr {command} ") and not printed.err


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for command, purpose in COMMANDS.items():
        assert any(line.split() == [command, *purpose.split()] for line in printed.splitlines())


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == version("modeling_diffusionvmr")


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["retreive"])
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and "'retreive'" in printed and printed.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_flag_is_one_line(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--nosuch"])
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
