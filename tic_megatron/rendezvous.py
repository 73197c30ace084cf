"""The store by which the processes of a group find each other."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import TCPStore

LOOPBACK = "127.0.0.1"


def open_store(host: str, timeout_s: float) -> TCPStore:
    """On a free port (`.port`) of this process, that of rank 0. `host` is this machine's address; on the loopback nobody else's
    machine can reach it.

    Rank 0 listens before anybody is told of the port: of one that is only looked up, another process may take possession.
    """
    port, listening = 0, None
    if host == LOOPBACK:  # by itself the store listens on all addresses
        listener = socket.create_server((LOOPBACK, 0))
        port = listener.getsockname()[1]
        listening = listener.detach()
    return TCPStore(
        host, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s), master_listen_fd=listening
    )


def join_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """The one that is open there."""
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))
