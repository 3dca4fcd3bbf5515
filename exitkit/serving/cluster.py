"""A Ray cluster for one piece of work: joined at its address, or started on this machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from exitkit.common.errors import ArgumentError
from exitkit.serving.deployment import import_ray, start_ray

_PATIENCE = 5.0


@contextmanager
def joined(address: str | None, cpus: int) -> Iterator[Any]:
    """Ray's top module, connected inside; where it was connected before, it stays so.

    Args:
        address: of a cluster, or ``"auto"``; None for this machine alone.
        cpus: how many are given to work on this machine alone.

    Raises:
        ArgumentError: an address where nothing listens.
        ExitkitError: Ray is not installed.
    """
    ray = import_ray()
    started = not ray.is_initialized()
    if started:
        connect(ray, address, cpus)
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


def connect(ray: Any, address: str | None, cpus: int) -> None:
    """Join or start a cluster, until ``ray.shutdown()``; the arguments are :func:`joined`'s."""
    if address is None:
        start_ray(ray, cpus)
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host:
        try:
            socket.create_connection((host, int(port)), _PATIENCE).close()
        except (OSError, ValueError) as error:
            raise ArgumentError(
                f"--ray {address!r}: nothing listens there ({error}); start one with: ray start --head"
            ) from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0][:160]
        raise ArgumentError(
            f"--ray {address!r} cannot be joined: {reason}; start one with: ray start --head"
        ) from error
