"""Recipes carried out as tasks on a Ray cluster, each in its folder, which all machines reach under one path."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exitkit.cli.machine import train_on
from exitkit.cli.recipes.recipe import Recipe
from exitkit.cli.recipes.repeating import carry_out, finish, finished
from exitkit.common.console import counted
from exitkit.common.errors import ArgumentError, ExitkitError

Chain = Sequence[tuple[Recipe, Path]]
"""Recipes and their folders; each begins from what the one before left."""


@contextmanager
def carried_out_on_ray(
    chains: Sequence[Chain], address: str | None, threads: int, device: str | None
) -> Iterator[Callable[[Recipe, Path], None]]:
    """Start all recipes that are not finished; yields what waits for one in its folder, and raises what stood in its way.

    Args:
        chains: a folder that several have is trained in once.
        address: of a cluster; None for this machine alone.
        threads: CPUs that each recipe has to itself.
        device: ``"cpu"`` or ``"cuda"``; by default a GPU each where the cluster has some.

    Raises:
        ArgumentError: an address where nothing listens, or no machine with so many CPUs and a GPU.
        ExitkitError: Ray is not installed.
    """
    from exitkit.serving.cluster import joined

    if device not in (None, "cpu", "cuda"):
        raise ArgumentError(f"--device {device!r}: with --ray every run is given its GPU; give cpu or cuda")
    with joined(address, max(threads, os.cpu_count() or 1)) as ray:
        cpus_and_gpus = _needed([node["Resources"] for node in ray.nodes() if node["Alive"]], threads, device)
        task = ray.remote(**cpus_and_gpus)(carried_out_here)
        started: dict[Path, Any] = {}
        for chain in chains:
            before = None
            for recipe, folder in chain:
                if folder not in started and not finished(recipe, folder):
                    started[folder] = task.remote(recipe, folder, os.getcwd(), threads, device, before)
                before = started.get(folder)

        def wait(recipe: Recipe, folder: Path) -> None:
            try:
                reason = ray.get(started[folder])
            except ray.exceptions.RayError as error:  # the machine or the process is lost, or a fault of ours
                raise ExitkitError(f"on Ray: {error}") from error
            if reason is not None:
                raise ExitkitError(reason)

        yield wait


def carried_out_here(
    recipe: Recipe, folder: Path, where: str, threads: int, device: str | None, before: str | None
) -> str | None:
    """What runs as a task: the reason why the recipe cannot be carried out, or None.

    Args:
        recipe: to carry out.
        folder: where, below ``where``, the working directory of the command.
        threads: of torch.
        device: as for ``exitkit train``.
        before: the reason of the recipe that this one begins from.
    """
    if before is not None:
        return before
    try:
        _enter(where)
        train_on(device)
        finish(recipe, folder, lambda one, own: carry_out(one, own, threads, _unsaid), _unsaid)
    except ExitkitError as error:
        return str(error)
    return None


def _enter(where: str) -> None:
    try:
        os.chdir(where)
    except OSError as error:
        raise ArgumentError(
            f"{where!r} is not on {socket.gethostname()}; with --ray all machines need the folder under one path"
        ) from error


def _unsaid(_: Any) -> None:
    """Nobody reads what a task says."""


def _needed(machines: Sequence[dict[str, float]], threads: int, device: str | None) -> dict[str, int]:
    """What Ray gives to each task; refused where no machine has it, as the task would wait for ever."""
    gpu = device == "cuda" or (device is None and any(machine.get("GPU", 0) for machine in machines))
    if not any(machine.get("CPU", 0) >= threads and machine.get("GPU", 0) >= gpu for machine in machines):
        wanted = f"{counted(threads, 'CPU')}{' and a GPU' * gpu}"
        raise ArgumentError(
            f"no machine of the cluster has {wanted} for a run; give --threads fewer{', or --device cpu' * gpu}"
        )
    return {"num_cpus": threads, "num_gpus": int(gpu)}
