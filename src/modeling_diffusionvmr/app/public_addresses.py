"""Download only from public addresses: visitors must not reach the network of the server through it."""

import http.client
import ipaddress
import socket
import threading
from contextlib import suppress
from typing import Any
from urllib.request import HTTPHandler, HTTPSHandler, ProxyHandler

from ..download import fetch

NAT64 = ipaddress.ip_network("64:ff9b::/96")
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # no other IPv6 address is in use on the public internet


def is_public(address: str) -> bool:
    """Return whether an IP address is reachable from everywhere, as is the IPv4 address that an IPv6 address wraps."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in NAT64:
            wrapped = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if wrapped:
            return is_public(str(wrapped))
        if ip not in GLOBAL_UNICAST:  # old forms that wrap or route to private addresses, which Python calls global
            return False
    return ip.is_global and not ip.is_multicast


def connect(host: str, port: int, timeout: float | None) -> socket.socket:
    """
    Connect to a host, whose addresses must all be public. The connection goes to an address that was checked, not to
    the name, which could lead to another address a moment later.

    Raises:
        OSError: if an address is not public, or no connection is possible.
    """
    addresses = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not all(map(is_public, addresses)):
        raise OSError(f"{host} is not a public address")
    failure = OSError(f"{host} has no address")
    for address in addresses:
        try:
            return socket.create_connection((address, port), timeout)
        except OSError as error:
            failure = error
    raise failure


class _Deadline:
    """Ends connections after a time, however slowly a server answers: a byte at a time, a timeout never passes."""

    def __init__(self) -> None:
        self.is_over = False
        self._sockets: list[socket.socket] = []

    def watch(self, sock: socket.socket) -> None:
        """End a connection at the deadline, or now if that has passed."""
        self._sockets.append(sock)
        if self.is_over:
            self.end()

    def end(self) -> None:
        """End all connections."""
        self.is_over = True
        for sock in self._sockets:
            with suppress(OSError):  # it has ended
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # below TLS, which may be reading


class _Connection(http.client.HTTPConnection):
    def __init__(self, *args, deadline: _Deadline, **kwargs):
        super().__init__(*args, **kwargs)
        self._deadline = deadline

    def connect(self) -> None:
        self.sock = connect(self.host, self.port, self.timeout)

    def getresponse(self):
        self._deadline.watch(self.sock)
        return super().getresponse()


class _SecureConnection(_Connection, http.client.HTTPSConnection):
    def connect(self) -> None:
        _Connection.connect(self)
        # The context, an attribute that the stubs of `http.client` lack, checks the certificate
        self.sock = self._context.wrap_socket(self.sock, server_hostname=self.host)  # type: ignore[attr-defined]


class _Handler(HTTPHandler):
    def __init__(self, deadline: _Deadline):
        super().__init__()
        self._deadline = deadline

    def http_open(self, req):
        return self.do_open(_Connection, req, deadline=self._deadline)


class _SecureHandler(HTTPSHandler):
    def __init__(self, deadline: _Deadline):
        super().__init__()
        self._deadline = deadline

    def https_open(self, req):
        return self.do_open(_SecureConnection, req, deadline=self._deadline)


def fetch_public(url: str, max_bytes: int, max_seconds: float) -> Any:
    """
    As `fetch`, from public addresses only. Each redirect connects, and is checked, anew. Proxies are not used: they
    would look up names themselves.

    Raises:
        OSError: also if the download takes longer than `max_seconds`.
        ValueError: see `fetch`.
    """
    deadline = _Deadline()
    timer = threading.Timer(max_seconds, deadline.end)
    timer.daemon = True
    timer.start()
    try:
        content = fetch(url, max_bytes, handlers=[ProxyHandler({}), _Handler(deadline), _SecureHandler(deadline)])
    except OSError as error:
        if deadline.is_over:
            raise OSError(f"{url}: the download takes longer than {max_seconds:g} s") from error
        raise
    finally:
        timer.cancel()
    if deadline.is_over:  # without a stated size, this looks like the end of the file
        raise OSError(f"{url}: the download takes longer than {max_seconds:g} s")
    return content
