"""
Fetch the common model tests of `transformers`, which are in its source distribution but not in its wheel.
`test_transformers_common.py` runs them on our models.

Run once during setup: `python tests/fetch_transformers_tests.py`. It does nothing if the tests are already there.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

VERSION = version("transformers")
CACHE = Path(__file__).resolve().parent.parent / ".cache"
TESTS_DIR = CACHE / f"transformers-{VERSION}-tests"


def download_source(folder: Path) -> Path:
    """Download the source distribution of the installed `transformers` with pip, and so with pip's index and proxy."""
    # pip builds the metadata of the distribution, which takes seconds. Build dependencies may be wheels
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
    command += ["--dest", str(folder), f"transformers=={VERSION}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or not archives:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise RuntimeError(lines[-1].removeprefix("ERROR: ") if lines else "pip downloaded no archive")
    return archives[0]


def unpack_tests(archive: Path, folder: Path) -> Path:
    """Unpack only `tests/` of the archive, and make it a package."""
    prefix = f"transformers-{VERSION}/tests/"
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.name.startswith(prefix)]
        tar.extractall(folder, members, filter="data")
    tests = folder / prefix
    if not (tests / "test_modeling_common.py").is_file():
        raise RuntimeError(f"the source distribution of transformers {VERSION} has no tests/test_modeling_common.py")
    (tests / "__init__.py").touch()
    return tests


def fetch() -> None:
    """Put the tests into `TESTS_DIR`, all or none of them."""
    if TESTS_DIR.is_dir():
        return
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        folder = Path(temporary)
        tests = unpack_tests(download_source(folder), folder)
        try:
            os.rename(tests, TESTS_DIR)
        except OSError:
            if not TESTS_DIR.is_dir():  # otherwise another process was faster
                raise


if __name__ == "__main__":
    try:
        fetch()
    except (OSError, RuntimeError, tarfile.TarError) as error:
        sys.exit(f"The tests of transformers {VERSION} could not be fetched: {error}")
