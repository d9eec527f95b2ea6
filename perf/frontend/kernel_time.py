"""When bytes were in the socket, by the kernel's own clock: the receive time stamps of the loopback device.

Over loopback the kernel stamps a segment while the sender is still inside its `send`, so a stamp is the moment at which
the server's bytes were in the socket, whenever they are read. It costs the server nothing. Linux; client side.
"""

import socket
import struct
import time

SO_TIMESTAMPNS = 35  # <asm-generic/socket.h>; also the type of the message that brings the time
TIMESPEC = struct.Struct("qq")


class StampedReader:
    """Reads from many sockets into one buffer."""

    __slots__ = ("_buffers", "_offset_s", "buffer", "stamp_s")

    def __init__(self, num_bytes: int) -> None:
        """`num_bytes`: most to read at once."""
        self.buffer = bytearray(num_bytes)  # one for all: a new one for each read would cost more than the read
        self.stamp_s = 0.0  # of the last segment of what was read last, in seconds of CLOCK_MONOTONIC
        self._buffers = [self.buffer]
        self._offset_s = time.monotonic() - time.time()  # stamps come in wall-clock time

    def prepare(self, connection: socket.socket) -> None:
        """Ask the kernel for stamps."""
        connection.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)

    def read(self, connection: socket.socket) -> int:  # hot
        """Bytes read; none where the peer has closed."""
        num_bytes, ancillary, _, _ = connection.recvmsg_into(self._buffers, 64)
        if ancillary:
            seconds, nanoseconds = TIMESPEC.unpack(ancillary[0][2])
            self.stamp_s = seconds + nanoseconds / 1e9 + self._offset_s
        return num_bytes
