import socket
import threading
import time
from contextlib import suppress
from urllib.parse import urlsplit

import pytest

from modeling_diffusionvmr.app import public_addresses
from modeling_diffusionvmr.app.public_addresses import fetch_public, is_public
from video_server import VideoServer

MAX_BYTES = 2**20


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:1.1.1.1"])
def test_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1", "ff0e::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::"),
        *("::7f00:1", "::ffff:0:7f00:1", "64:ff9b:1::7f00:1", "fec0::1"),
    ],
)
def test_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0", "[::1]", "[::ffff:127.0.0.1]"])
def test_loopback_in_all_spellings(video_server, host):
    video_server.files["a"] = b"content"
    with pytest.raises(OSError, match=r"cannot be reached \("):
        fetch_public(f"http://{host}:{video_server.server_port}/plain/a", MAX_BYTES, 20)
    assert video_server.requested == []


@pytest.fixture
def names(monkeypatch):
    """A dict of names to the addresses that each look-up gives, one after the other. Literal addresses are as usual."""
    names: dict[str, list[list[str]]] = {}
    look_up = socket.getaddrinfo

    def getaddrinfo(host, port, *arguments, **options):
        if host not in names:
            return look_up(host, port, *arguments, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in names[host].pop(0)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(public_addresses, "is_public", lambda address: address == "127.0.0.1")  # of the test's server
    return names


def test_name_with_a_private_address(names, video_server):
    names["example.org"] = [["127.0.0.1", "127.0.0.2"]]
    with pytest.raises(OSError, match="example.org is not a public address"):
        fetch_public(f"http://example.org:{video_server.server_port}/plain/a", MAX_BYTES, 20)
    assert video_server.requested == []


def test_the_address_that_was_checked_is_used(names, video_server):
    """A second look-up would give another address."""
    video_server.files["a"] = b"content"
    names["example.org"] = [["127.0.0.1"], ["127.0.0.2"]]
    content = fetch_public(f"http://example.org:{video_server.server_port}/plain/a", MAX_BYTES, 20)
    assert content.read() == b"content" and names["example.org"] == [["127.0.0.2"]]


def test_the_next_address_is_tried(names, video_server, monkeypatch):
    video_server.files["a"] = b"content"
    monkeypatch.setattr(public_addresses, "is_public", lambda address: True)
    names["example.org"] = [["127.0.0.3", "127.0.0.1"]]  # nobody listens at the first one
    content = fetch_public(f"http://example.org:{video_server.server_port}/plain/a", MAX_BYTES, 20)
    assert content.read() == b"content"


def test_redirects_are_checked(names, video_server):
    video_server.files["a"] = b"content"
    other = f"http://127.0.0.2:{video_server.server_port}/plain/a"
    with pytest.raises(OSError, match="127.0.0.2 is not a public address"):
        fetch_public(video_server.url(f"redirect?to={other}"), MAX_BYTES, 20)
    assert len(video_server.requested) == 1
    same = video_server.url("plain/a")
    assert fetch_public(video_server.url(f"redirect?to={same}"), MAX_BYTES, 20).read() == b"content"


def test_proxies_are_not_used(video_server, monkeypatch):
    """A proxy would look up the name again, in another network."""
    monkeypatch.setenv("http_proxy", video_server.url(""))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(OSError, match="192.168.7.7 is not a public address"):
        fetch_public("http://192.168.7.7/plain/a", MAX_BYTES, 20)
    assert video_server.requested == []


def test_https_is_checked_too(video_server):
    port = urlsplit(video_server.url("")).port
    with pytest.raises(OSError, match="127.0.0.1 is not a public address"):
        fetch_public(f"https://127.0.0.1:{port}/plain/a", MAX_BYTES, 20)


def test_https_checks_the_certificate(names):
    """The connection that was checked is the one that is encrypted."""
    with VideoServer() as server:
        names["example.org"] = [["127.0.0.1"]]
        with pytest.raises(OSError, match=r"cannot be reached \(.*SSL"):
            fetch_public(f"https://example.org:{server.server_port}/plain/a", MAX_BYTES, 20)


@pytest.mark.parametrize(
    "beginning",
    ["HTTP/1.1 200 OK\r\nX: ", "HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"],
)
def test_slow_servers(names, beginning):
    """One byte after the other: no timeout of the connection ever passes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection, suppress(OSError):
                connection.recv(2**16)
                connection.sendall(beginning.encode())
                for _ in range(200):
                    connection.sendall(b"a")
                    time.sleep(0.1)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(OSError, match=r"/film\.mp4: the download takes longer than 0.5 s$"):
            fetch_public(f"http://127.0.0.1:{server.getsockname()[1]}/film.mp4", MAX_BYTES, 0.5)
        thread.join(5)
        assert not thread.is_alive()
