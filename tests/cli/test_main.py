"""The `diffusionvmr` command: wrong arguments, its entry points, and how errors are reported."""

import argparse
import errno
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from importlib.metadata import version

import pytest
import torch
from safetensors import SafetensorError

from modeling_diffusionvmr import DEFAULT_MODEL
from modeling_diffusionvmr.cli import COMMANDS, main
from modeling_diffusionvmr.cli.errors import run_safely
from modeling_diffusionvmr.cli.options import check_checkpoint, check_output, load_model, resolve_model

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
    """It parses first, then executes the package and runs the command. An error is one line."""
    (tmp_path / "rows.jsonl").write_text(ROW)
    code = (
        CONSOLE
        + """
sys.argv[1:] = "simulate --annotations rows.jsonl --output_dir out --size 8".split()
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
    heavy = ("torch", "transformers", "datasets", "pandas", "av", "evaluate", "matplotlib", "h5py", "gradio")
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
        (
            ModuleNotFoundError("No module named 'gradio'", name="gradio"),
            "error: No module named 'gradio'; install it with: pip install 'modeling_diffusionvmr[app]'",
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


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # As safetensors and `torch.save` raise them where the disk is full
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ],
)
def test_full_disk(error):
    def run(arguments):
        raise error

    with pytest.raises(SystemExit) as caught:
        run_safely(run, argparse.Namespace(output_dir="runs/a", model="m"))
    assert caught.value.code == f"error: runs/a: cannot be written, because the disk is full ({error})"


@pytest.mark.parametrize("stage", ["parse", "run"])
@pytest.mark.parametrize("command", COMMANDS)
def test_interrupt(monkeypatch, capsys, command, stage):
    """Also while the command's module is loaded."""

    def interrupt(arguments):
        raise KeyboardInterrupt

    module = importlib.import_module(f"modeling_diffusionvmr.cli.{command}")
    monkeypatch.setattr(module, "parse", lambda argv: argparse.Namespace())
    monkeypatch.setattr(module, stage, interrupt)
    assert exit_of(command).code == 130
    printed = capsys.readouterr()
    assert printed.err == "interrupted\n" and printed.out == ""


def test_interrupt_from_the_terminal(tmp_path):
    """Ctrl-C goes to the console script and its workers, which have written a file. Only the script speaks."""
    rows = [{**json.loads(ROW), "qid": qid, "vid": f"v{qid}"} for qid in range(5_000)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = "simulate --annotations rows.jsonl --output_dir out --workers 2".split()
    process = subprocess.Popen(
        [sys.executable, "-c", f"{CONSOLE}\nmain()", *arguments],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and not list(tmp_path.glob("out/clip/[!.]*.npz")):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "interrupted" and "Traceback" not in said
    assert not list(tmp_path.glob("out/**/.*"))


# Outputs


@pytest.mark.parametrize("is_folder", [True, False])
def test_outputs_that_can_be_written(tmp_path, is_folder):
    for path in (tmp_path / "new", tmp_path / "new" / "below"):
        check_output(path, "--output", is_folder)
    assert not list(tmp_path.iterdir())
    check_output(tmp_path, "--output")


@pytest.mark.parametrize(
    "path, is_folder, message",
    [
        ("file", True, "--output {0}/file: {0}/file is a file, not a folder"),
        ("file/below", True, "--output {0}/file/below: {0}/file is a file, not a folder"),
        ("file/below/it", False, "--output {0}/file/below/it: {0}/file is a file, not a folder"),
        ("link", True, "--output {0}/link: {0}/link is a file, not a folder"),
        ("folder", False, "--output {0}/folder: a folder, not a file"),
    ],
)
def test_outputs_that_cannot_be_written(tmp_path, path, is_folder, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ValueError) as error:
        check_output(tmp_path / path, "--output", is_folder)
    assert str(error.value) == message.format(tmp_path)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs a folder in which nobody can write")
def test_output_in_a_folder_that_is_not_writable():
    with pytest.raises(ValueError, match="--output /proc/out: cannot write to /proc"):
        check_output("/proc/out", "--output")


@pytest.mark.parametrize(
    "command, flag",
    [
        ("train --annotations a --video_features b --text_features c --output_dir {}", "--output_dir"),
        ("extract {} --annotations a --backbone b", "OUTPUT_DIR"),
        ("simulate --annotations a --output_dir {}", "--output_dir"),
        ("convert tacos {} --annotations a --video_features b --text_features c", "OUTPUT"),
        ("evaluate --annotations a --video_features b --text_features c --output_dir {}", "--output_dir"),
        ("plot --annotations a --predictions b --qid 1 --output {}/out.png", "--output"),
    ],
)
def test_outputs_are_checked_before_the_inputs(tmp_path, command, flag):
    (tmp_path / "file").touch()
    line = exit_of(*command.format(tmp_path / "file" / "below").split()).code
    assert line.startswith(f"error: {flag} {tmp_path}/file/below")
    assert line.endswith(f": {tmp_path}/file is a file, not a folder")


def test_warnings_are_one_line_and_only_inside(capsys):
    before = warnings.showwarning
    run_safely(lambda arguments: warnings.warn("of the data", stacklevel=1), argparse.Namespace())
    assert capsys.readouterr().err == "warning: of the data\n"
    assert warnings.showwarning is before


@pytest.mark.parametrize("name", ["clip", "openai/clip-vit-base-patch32", "A_1/b.c"])
def test_hub_id(name):
    assert check_checkpoint(name) == name


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
