"""Fixtures for the tests of commands."""

import pytest

from modeling_diffusionvmr.cli import main


@pytest.fixture
def error_of():
    """Run a command that must fail; return the line with which it ends."""

    def run(*argv) -> str:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in argv])
        line = caught.value.code  # a string: Python prints it to stderr, and the exit status is 1
        assert isinstance(line, str) and line.startswith("error: ") and len(line.splitlines()) == 1
        print(line)
        return line

    return run
