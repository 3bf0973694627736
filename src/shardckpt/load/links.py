"""Links between the ranks of one host: a socket each, and each other's memory to copy from.

Layer: load. Every rank opens a door, a listening socket without a name in any file system, and
tells the others its secret through the round. Linked ranks pass descriptors of anonymous shared
memory through the socket, so nothing is left behind whoever dies, and a rank that goes away is
noticed at once. That two ranks share a host is guessed from the kernel's boot id and network
namespace; whether they do is proved by the link itself.
"""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import mmap
import os
import secrets
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, final

import numpy as np

from shardckpt.storage.fileops import PosixFileOps, close_unwritten

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

LINK_TIMEOUT_S: Final = 10.0
_SECRET_BYTES: Final = 32
_HELLO: Final = struct.Struct(f"<{_SECRET_BYTES}sIQ")
_RECORD: Final = struct.Struct("<cIQ")
_MOST_WAITING: Final = 1024

READY: Final = b"R"
DONE: Final = b"D"
FAILED: Final = b"F"


class LinkError(Exception):
    """Internal: two ranks that seemed to share a host could not be linked."""


def host_name() -> str:
    """Return a name that ranks share where memory can likely be shared, too."""
    ops = PosixFileOps()
    try:
        boot = ops.open("/proc/sys/kernel/random/boot_id", os.O_RDONLY, dir_fd=None)
        try:
            text = ctypes.create_string_buffer(64)
            num_bytes = ops.read_at(boot, ctypes.addressof(text), len(text), 0)
        finally:
            close_unwritten(ops, boot)
        network = ops.open("/proc/self/ns/net", os.O_RDONLY, dir_fd=None)
        try:
            namespace = ops.stat_fd(network).st_ino
        finally:
            close_unwritten(ops, network)
    except OSError:
        return secrets.token_hex(16)
    return f"{text.raw[:num_bytes].decode().strip()}/{namespace}"


@final
class Memory:
    """Bytes of this process or, read-only, of another one; gone with the last reference."""

    def __init__(self, mapping: mmap.mmap) -> None:
        """Hold a mapping."""
        self._mapping: Final = mapping
        # ctypes refuses the address of read-only memory.
        self.address: Final[int] = np.frombuffer(mapping, np.uint8).ctypes.data
        self.nbytes: Final = len(mapping)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Return a part of it."""
        return memoryview(self._mapping)[offset : offset + nbytes]


@dataclass(slots=True)
class Link:
    """The connection with another rank of this host.

    Attributes:
        rank: The other rank.
        memory: Its slots, to copy from; None where it has none.
    """

    rank: int
    memory: Memory | None
    _socket: socket.socket
    _received: bytearray = field(default_factory=bytearray)

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._socket.fileno()

    def send(self, kind: bytes, batch: int = 0, offset: int = 0) -> None:
        """Send a record. The few that are ever on their way always fit; never raises.

        To a rank that is gone nothing is sent; `records` tells of it.
        """
        try:
            self._socket.sendall(_RECORD.pack(kind, batch, offset))
        except OSError:
            return

    def records(self) -> Iterator[tuple[bytes, int, int] | None]:
        """Yield what has come: kind, batch, offset; None once the other rank is gone."""
        try:
            data = self._socket.recv(1 << 16)
        except OSError:
            data = b""
        self._received += data
        while len(self._received) >= _RECORD.size:
            yield _RECORD.unpack(self._received[: _RECORD.size])
            del self._received[: _RECORD.size]
        if not data:
            yield None

    def close(self) -> None:
        """Part from the other rank."""
        self._socket.close()


@final
class Door:
    """Where other ranks of this host find this one. Close it when all are linked."""

    def __init__(self) -> None:
        """Open it; where the system has no such sockets, nobody will find it."""
        self.secret: Final = secrets.token_hex(_SECRET_BYTES)
        self._listener: socket.socket | None = None
        self._memory: Memory | None = None
        try:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(_address(self.secret))
            self._listener.listen(_MOST_WAITING)
        except OSError:
            self.close()

    def link(
        self, rank: int, peers: Mapping[int, str], memory_bytes: int
    ) -> tuple[Memory, dict[int, Link]]:
        """Link with every peer; they do the same meanwhile.

        Args:
            rank: This rank.
            peers: Secret of each rank to link with.
            memory_bytes: Size of the memory that these can copy from.

        Returns:
            The memory, and the link with each peer.

        Raises:
            LinkError: Some peer was not reached or did not come in time.
        """
        if self._listener is None:
            raise LinkError("this system has no sockets of the kind that is needed")
        ops = PosixFileOps()
        links: dict[int, Link] = {}
        try:
            fd = os.memfd_create("shardckpt-load")
            try:
                # Reserved now, since memory that is short later would be a fatal signal.
                ops.fallocate(fd, memory_bytes)
                memory = Memory(mmap.mmap(fd, memory_bytes))
                self._meet(rank, peers, fd, memory_bytes, links)
            finally:
                close_unwritten(ops, fd)
        except (OSError, ValueError) as error:
            for link in links.values():
                link.close()
            raise LinkError(f"{type(error).__name__}: {error}") from error
        return memory, links

    def close(self) -> None:
        """Take no more visitors."""
        if self._listener is not None:
            self._listener.close()
        self._listener = None

    def _meet(
        self, rank: int, peers: Mapping[int, str], fd: int, nbytes: int, links: dict[int, Link]
    ) -> None:
        """Call on lower ranks and let in higher ones; all greet before they listen."""
        assert self._listener is not None
        deadline = time.monotonic() + LINK_TIMEOUT_S
        called: dict[int, socket.socket] = {}
        visitor: socket.socket | None = None
        try:
            for peer in sorted(p for p in peers if p < rank):
                called[peer] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                called[peer].settimeout(_remaining(deadline))
                called[peer].connect(_address(peers[peer]))
                _greet(called[peer], peers[peer], rank, nbytes, fd)
            while len(links) + len(called) < len(peers):
                self._listener.settimeout(_remaining(deadline))
                visitor, _ = self._listener.accept()
                visitor.settimeout(_remaining(deadline))
                link = _greeted(visitor, self.secret)
                if link is None or link.rank not in peers or link.rank in links:
                    visitor.close()  # No rank of this job: it does not know the secret.
                    continue
                links[link.rank] = link
                _greet(visitor, peers[link.rank], rank, nbytes, fd)
            for peer in list(called):
                called[peer].settimeout(_remaining(deadline))
                link = _greeted(called[peer], self.secret)
                links[peer] = _checked(link, peer)
                del called[peer]
        except BaseException:
            for caller in called.values():
                caller.close()
            if visitor is not None:
                visitor.close()
            raise


def _checked(link: Link | None, peer: int) -> Link:
    if link is None or link.rank != peer:
        raise OSError(f"what answers in place of rank {peer} is another program")
    return link


def _address(secret: str) -> str:
    """Return the name of a door: listed by the system, so it must not be the secret itself."""
    return "\0shardckpt-" + hashlib.sha256(secret.encode()).hexdigest()[:32]


def _remaining(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())


def _greet(peer: socket.socket, secret: str, rank: int, nbytes: int, fd: int) -> None:
    """Show the peer its own secret, and pass the memory."""
    hello = _HELLO.pack(bytes.fromhex(secret), rank, nbytes)
    socket.send_fds(peer, [hello], [fd])


def _greeted(peer: socket.socket, secret: str) -> Link | None:
    """Return the link with who shows our secret; None for anybody else."""
    ops = PosixFileOps()
    hello, fds, _, _ = socket.recv_fds(peer, _HELLO.size, 1)
    try:
        if len(hello) != _HELLO.size or len(fds) != 1:
            return None
        shown, rank, nbytes = _HELLO.unpack(hello)
        if not hmac.compare_digest(shown, bytes.fromhex(secret)):
            return None
        if ops.stat_fd(fds[0]).st_size != nbytes:
            return None
        peer.setblocking(True)
        return Link(rank, Memory(mmap.mmap(fds[0], nbytes, prot=mmap.PROT_READ)), peer)
    finally:
        for fd in fds:
            close_unwritten(ops, fd)
