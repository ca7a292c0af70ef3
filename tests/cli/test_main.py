"""The `diffusionvmr` command: wrong arguments, its entry points, and how errors are reported."""

import argparse
import os
import runpy
import subprocess
import sys
import warnings
from importlib.metadata import version

import pytest
import torch

from modeling_diffusionvmr import DEFAULT_MODEL
from modeling_diffusionvmr.cli import COMMANDS, main
from modeling_diffusionvmr.cli.options import HUB_ID, load_model, resolve_model, run_safely

CONSOLE = "import sys; from diffusionvmr_command import main"  # as the console script that pip installs
ROW = '{"qid": 1, "query": "a dog", "vid": "v", "duration": 10}\n'


def python(*arguments, folder) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, env=environment, timeout=300
    )


def exit_of(*argv) -> SystemExit:
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    return caught.value


# Arguments


def test_no_arguments_print_the_help(capsys):
    assert exit_of().code == 0
    without = capsys.readouterr().out
    exit_of("--help")
    assert without == capsys.readouterr().out and without.startswith("usage: diffusionvmr")


@pytest.mark.parametrize("argv", [["retreive"], ["fly", "--top_k", "1"], ["--fly"], [""]])
def test_unknown_command(capsys, argv):
    assert exit_of(*argv).code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and len(captured.err.splitlines()) == 1
    assert argv[0].startswith("-") or repr(argv[0]) in captured.err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["plot"], "the following arguments are required: --annotations"),
        (["simulate", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["simulate", "--noise", "loud"], "argument --noise: invalid choice: 'loud'"),
        (["evaluate", "--batch"], "error: "),
        (["retrieve", "a.mp4"], "the following arguments are required: QUERY"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(capsys, argv, message):
    assert exit_of(*argv).code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err
    assert captured.err.startswith("error: ") and len(captured.err.splitlines()) == 1
    assert f"`diffusionvmr {argv[0]} --help`" in captured.err


# Entry points


def test_console_script(tmp_path):
    """It parses first, then executes the package and runs the command, with worker processes. An error is one line."""
    (tmp_path / "rows.jsonl").write_text(ROW)
    code = (
        CONSOLE
        + """
sys.argv[1:] = "simulate --annotations rows.jsonl --output_dir out --size 8 --workers 2".split()
main()
print(file=sys.stderr)
sys.argv[1:] = "simulate --annotations absent.jsonl --output_dir absent".split()
main()
"""
    )
    result = python("-c", code, folder=tmp_path)
    assert "wrote 2 files" in result.stderr and (tmp_path / "out" / "clip" / "v.npz").exists()
    assert result.returncode == 1 and result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "absent.jsonl" in line and "Traceback" not in result.stderr


def test_module(tmp_path, monkeypatch, capsys):
    """`python -m modeling_diffusionvmr` is the same command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROW)
    command = "simulate --annotations rows.jsonl --output_dir out --size 8".split()
    monkeypatch.setattr(sys, "argv", ["diffusionvmr", *command])
    runpy.run_module("modeling_diffusionvmr", run_name="__main__")
    assert "wrote 2 files" in capsys.readouterr().err and (tmp_path / "out" / "clip" / "v.npz").exists()


# Help

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


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_flag_is_one_line(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--nosuch"])
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1


# What they share


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("a.jsonl, line 3: not JSON"), "error: a.jsonl, line 3: not JSON"),
        (FileNotFoundError(2, "No such file or directory", "a"), "error: [Errno 2] No such file or directory: 'a'"),
        (ImportError("needs av"), "error: needs av"),
        (ModuleNotFoundError("No module named 'other'", name="other"), "error: No module named 'other'"),
        (
            ModuleNotFoundError("No module named 'h5py'", name="h5py"),
            "error: No module named 'h5py'; install it with: pip install 'modeling_diffusionvmr[train]'",
        ),
        (OSError("first line\n   second line\n"), "error: first line second line"),
        (ValueError(), "error: ValueError"),
        (MemoryError("8 TiB"), "error: not enough memory; use smaller sizes or batches (8 TiB)"),
        (torch.OutOfMemoryError("CUDA"), "error: not enough memory; use smaller sizes or batches (CUDA)"),
    ],
)
def test_errors_are_one_line(error, line):
    def run(arguments):
        raise error

    with pytest.raises(SystemExit) as caught:
        run_safely(run, argparse.Namespace())
    assert caught.value.code == line


@pytest.mark.parametrize("error", [KeyError("a fault"), RuntimeError("a fault"), TypeError("a fault")])
def test_faults_of_the_code_keep_their_traceback(error):
    def run(arguments):
        raise error

    with pytest.raises(type(error)):
        run_safely(run, argparse.Namespace())


def test_warnings_are_one_line_and_only_inside(capsys):
    before = warnings.showwarning
    run_safely(lambda arguments: warnings.warn("of the data", stacklevel=1), argparse.Namespace())
    assert capsys.readouterr().err == "warning: of the data\n"
    assert warnings.showwarning is before


@pytest.mark.parametrize("name", ["clip", "openai/clip-vit-base-patch32", "A_1/b.c"])
def test_hub_id(name):
    assert HUB_ID.fullmatch(name)


@pytest.mark.parametrize("name", ["", "/a", "./a", "../a", "a/b/c", "a/", "a b", "-a", "a\\b"])
def test_not_a_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="not a local folder or a valid Hub id"):
        load_model(argparse.Namespace(model=name, trust_remote_code=False))


def test_embedded_model_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_model("embedded") == resolve_model(None) == DEFAULT_MODEL
    (tmp_path / "embedded").mkdir()
    assert resolve_model("embedded") == "embedded"
