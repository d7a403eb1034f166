"""A socket that cannot be listened on is told before anything is served."""

from __future__ import annotations

import socket

import pytest

from gateway.listener import ListenError, bind
from tests.support.sockets import bind_free, free_port, tcp_socket


def test_a_port_somebody_listens_on_is_told() -> None:
    with bind_free() as rival:
        rival.listen()
        with pytest.raises(ListenError, match="in use"):
            bind("127.0.0.1", rival.getsockname()[1])


def test_a_bound_port_is_ours_at_once() -> None:
    """Two sockets may be bound to one port while neither listens, and uvloop swallows that the second cannot."""
    with bind("127.0.0.1", free_port()) as ours, tcp_socket() as rival:
        rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            rival.bind(ours.getsockname())
