"""Download only from public addresses: visitors must not reach the network of the server through it."""

import http.client
import ipaddress
import socket
from urllib.request import BaseHandler, HTTPHandler, HTTPSHandler, ProxyHandler

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


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = connect(self.host, self.port, self.timeout)


class _SecureConnection(http.client.HTTPSConnection, _Connection):
    """Its `connect` calls the one above, then checks the certificate for the name of the host."""


class _Handler(HTTPHandler):
    def http_open(self, req):
        return self.do_open(_Connection, req)


class _SecureHandler(HTTPSHandler):
    def https_open(self, req):
        return self.do_open(_SecureConnection, req)


def public_only() -> list[BaseHandler]:
    """Return handlers for `fetch`. Each redirect connects, and is checked, anew. Proxies would look up names alone."""
    return [ProxyHandler({}), _Handler(), _SecureHandler()]
