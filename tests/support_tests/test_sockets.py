"""Ports that are free and differ, and what a peer has not read."""

from __future__ import annotations

import socket

from tests.support.sockets import HIGHEST_PORT, LOWEST_PORT, bind_free, free_port, unread_by_peer


def test_free_ports_differ_and_lie_below_the_kernels_own() -> None:
    """A gateway in a test needs two at once."""
    ports = [free_port() for _ in range(200)]
    assert len(set(ports)) == 200
    assert all(LOWEST_PORT <= port <= HIGHEST_PORT for port in ports)


def test_what_the_peer_has_not_read_is_known_exactly() -> None:
    """Whether or not it was acknowledged yet."""
    with bind_free() as held:
        held.listen()
        with socket.create_connection(held.getsockname()) as client, held.accept()[0] as accepted:
            assert unread_by_peer(client) == 0
            client.sendall(b"12345")
            assert unread_by_peer(client) == 5
            assert accepted.recv(3) == b"123"
            assert unread_by_peer(client) == 2
            assert accepted.recv(3) == b"45"
            assert unread_by_peer(client) == 0
