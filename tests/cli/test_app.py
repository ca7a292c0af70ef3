import http.client
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from modeling_diffusionvmr.cli import main


def error_of(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["app", *argv])
    return str(caught.value.code)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--port", "70000"], "error: --port must be from 1 to 65535, got 70000"),
        (["--concurrency", "0"], "error: --concurrency must be at least 1, got 0"),
        (["--max_upload_mb", "-1"], "error: --max_upload_mb must be at least 1, got -1"),
        (["--max_video_seconds", "nan"], "error: --max_video_seconds must be a number above 0, got nan"),
        (["--max_encoding_seconds", "0"], "error: --max_encoding_seconds must be a number above 0, got 0.0"),
        (["--num_examples", "-1"], "error: --num_examples must be at least 0, got -1"),
        (["--model", "no/such/model"], "error: no/such/model: not a local folder or a valid Hub id"),
        (["--host", "192.0.2.1"], "error: --host 192.0.2.1: cannot listen there (Cannot assign requested address)"),
    ],
)
def test_wrong_arguments(capsys, argv, message):
    assert error_of(capsys, *argv).startswith(message)


def test_port_in_use(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert error_of(capsys, "--port", str(port)).startswith(
            f"error: --host 127.0.0.1 --port {port}: cannot listen there"
        )


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("sent", [signal.SIGTERM])
def test_command(tmp_path, sent):
    """It serves on the loopback alone, says where, and removes its files when it is stopped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "modeling_diffusionvmr", "app", "--port", str(port), "--num_examples", "1"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stderr.readline, "")
        said = next(line for line in lines if line.startswith("Open "))
        assert said == f"Open http://127.0.0.1:{port}/ in a browser. Press Ctrl-C to stop the server.\n"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()
        assert list(tmp_path.glob("diffusionvmr_app_*/*.mp4"))
        with pytest.raises(OSError):
            socket.create_connection((_own_address(), port), timeout=2)
    finally:
        process.send_signal(sent)
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.kill()
        rest = process.communicate()[0]
    assert process.returncode == 130, rest
    assert not list(tmp_path.glob("diffusionvmr_app_*"))


def _own_address() -> str:
    """An address of this computer that is not the loopback, if there is one, else one at which nobody listens."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.2"
