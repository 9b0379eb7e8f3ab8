# SPDX-License-Identifier: MIT
"""TAP interfaces of the kernel, with its offloads.

Source: Linux' Documentation/networking/tuntap.rst, linux/if_tun.h; rtnetlink(7) for addresses.
"""

import errno
import fcntl
import os
import re
import socket
import struct
from contextlib import suppress
from ipaddress import IPv4Interface, IPv6Interface

from paravirt.errors import AlreadyExists, InvalidRequest, PermissionRefused, ResourceLimit

_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_TUNSETCARRIER = 0x400454E2
_RTM_NEWADDR, _IFA_ADDRESS, _IFA_LOCAL, _IFA_F_NODAD = 20, 1, 2, 0x02
_NLM_NEW = 0x1 | 0x4 | 0x100 | 0x400  # REQUEST, ACK, REPLACE, CREATE
_SIOCSIFFLAGS = 0x8914
_SIOCSIFMTU, _SIOCSIFHWADDR = 0x8922, 0x8924
_IFF_UP, _IFF_RUNNING = 0x1, 0x40
_ARPHRD_ETHER = 1
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_CSUM, _TSO4, _TSO6, _TSO_ECN = 0x01, 0x02, 0x04, 0x08
VNET_BYTES = 10
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}", re.ASCII)


class Tap:
    """A TAP interface of this network namespace: gone when it is closed."""

    def __init__(self, name: str, *, offloads: bool = True) -> None:
        """`offloads`: the kernel hands over large packets and blank checksums, and takes them.

        Raises `InvalidRequest` (name), `AlreadyExists` (in use), `PermissionRefused`, `ResourceLimit`.
        """
        if not _NAME.fullmatch(name):
            raise InvalidRequest(f"{name[:40]!r} is no name of an interface")
        try:
            self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except PermissionError as error:
            raise PermissionRefused(
                "/dev/net/tun may not be opened by this process; isolated domains may with `run --net`"
            ) from error
        except OSError as error:
            raise ResourceLimit(f"no /dev/net/tun here: {error.strerror}") from error
        self.name = name
        self.vnet_bytes = VNET_BYTES if offloads else 0
        flags = _IFF_TAP | _IFF_NO_PI | (_IFF_VNET_HDR if offloads else 0)
        try:
            fcntl.ioctl(self.fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
            if offloads:
                fcntl.ioctl(self.fd, _TUNSETOFFLOAD, _CSUM | _TSO4 | _TSO6 | _TSO_ECN)
        except OSError as error:
            os.close(self.fd)
            if error.errno == errno.EBUSY:
                raise AlreadyExists(f"interface {name} is in use") from error
            if error.errno == errno.EPERM:
                raise PermissionRefused(
                    f"interface {name} may not be made: that needs CAP_NET_ADMIN in this network namespace, which "
                    "isolated domains have with `run --net` only"
                ) from error
            raise InvalidRequest(f"interface {name} cannot be made: {error.strerror}") from error

    def set_mac(self, mac: bytes) -> None:
        """Raises `InvalidRequest`."""
        self._ask(_SIOCSIFHWADDR, struct.pack("16sH6s16x", self.name.encode(), _ARPHRD_ETHER, mac), "address")

    def set_mtu(self, mtu: int) -> None:
        """Raises `InvalidRequest`."""
        self._ask(_SIOCSIFMTU, struct.pack("16si20x", self.name.encode(), mtu), "MTU")

    def add_address(self, address: IPv4Interface | IPv6Interface) -> None:
        """One more, to be used at once: nobody is asked whether it is another's, too. Raises `InvalidRequest`."""
        family = socket.AF_INET if isinstance(address, IPv4Interface) else socket.AF_INET6
        index = socket.if_nametoindex(self.name)
        body = struct.pack("=BBBBI", family, address.network.prefixlen, _IFA_F_NODAD, 0, index)
        for kind in (_IFA_LOCAL, _IFA_ADDRESS):
            body += struct.pack("=HH", 4 + len(address.ip.packed), kind) + address.ip.packed
        message = struct.pack("=IHHII", 16 + len(body), _RTM_NEWADDR, _NLM_NEW, 1, 0) + body
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
            kernel.send(message)
            (error,) = struct.unpack_from("=i", kernel.recv(4096), 16)
        if error:
            raise InvalidRequest(f"address {address} of interface {self.name}: {os.strerror(-error)}")

    def bring_up(self) -> None:
        """Raises `InvalidRequest`."""
        self._ask(_SIOCSIFFLAGS, struct.pack("16sH22x", self.name.encode(), _IFF_UP | _IFF_RUNNING), "state")

    def set_carrier(self, on: bool) -> None:
        """Whether anything is at the other end, as the kernel sees it. Where the kernel cannot say that, nothing."""
        with suppress(OSError):
            fcntl.ioctl(self.fd, _TUNSETCARRIER, struct.pack("i", on))

    def _ask(self, request: int, argument: bytes, what: str) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            try:
                fcntl.ioctl(control, request, argument)
            except OSError as error:
                raise InvalidRequest(f"the {what} of interface {self.name}: {error.strerror}") from error

    def close(self) -> None:
        """Harmless when repeated."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
