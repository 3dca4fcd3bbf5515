"""``serve``, and ``run`` on a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from exitkit.cli.options import PackageDevice, Tau
from exitkit.common.errors import ArgumentError

_LOCAL = "local"


def serve(
    package: Annotated[
        Path | None, typer.Argument(help="What exitkit export wrote: .pt2, .onnx.zip or .pte; or named in --config")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every network, with no password")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on")] = 8000,
    metrics_port: Annotated[int, typer.Option(help="Port where Prometheus reads, on the same machine")] = 8001,
    replicas: Annotated[int | None, typer.Option(help="Processes that answer; by default one")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="serve.yaml: threshold, max_wait_ms and the other settings; options stand above it"),
    ] = None,
    threshold: Tau = None,
    device: PackageDevice = None,
    trust: Annotated[bool | None, typer.Option("--trust", help="You trust the code in a .pt2")] = None,
) -> None:
    """Answer requests over HTTP, each as soon as its sample leaves.

    A page to try it, /predict for images and texts, the Open Inference Protocol under /v2, metrics through Ray. SIGTERM
    answers what was taken, and ends; SIGHUP reads the threshold of --config anew.
    """
    from exitkit.serving.deployment import serve_until_stopped
    from exitkit.serving.settings import Settings, read_settings

    for name, number in {"port": port, "metrics-port": metrics_port}.items():
        if not 0 < number < 2**16:
            raise ArgumentError(f"--{name} {number} must be from 1 to 65535")
    named = None if package is None else str(package.absolute())
    given: dict[str, Any] = {
        "package": named, "replicas": replicas, "threshold": threshold, "device": device, "trust": trust
    }  # fmt: skip
    if config is not None:
        serve_until_stopped(
            read_settings(config, **given), host, port, metrics_port, lambda: read_settings(config, **given)
        )
        return
    if package is None:
        raise ArgumentError("name the PACKAGE to serve, or a --config that does")
    serve_until_stopped(
        Settings(**{name: value for name, value in given.items() if value is not None}), host, port, metrics_port
    )


def run_on_ray(
    package: Path, inputs: list[str], address: str, out: Path, batch_size: int, threshold: float | None,
    device: str | None, trust: bool, actors: int,
) -> str:  # fmt: skip
    """Answer a folder, bucket, Parquet or CSV file on a Ray cluster, and write Parquet; says how many left where.

    Raises:
        ArgumentError: several inputs, an address where nothing listens, a target that is there already.
    """
    from exitkit.serving.ray_files import write_predictions

    if len(inputs) != 1:
        raise ArgumentError(f"--ray takes one place with inputs, not {len(inputs)}: a folder, a .parquet or a .csv")
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "threshold": threshold,
        "device": device,
        "trust": trust,
        "actors": actors,
    }
    return write_predictions(package, inputs[0], cluster_of(address), out, **options)


def cluster_of(given: str) -> str | None:
    """The address that ``--ray`` names; None for this machine alone."""
    return None if given == _LOCAL else given


RayAddress = Annotated[
    str | None,
    typer.Option("--ray", help="Run on a Ray cluster: its address, 'auto', or 'local' for this machine alone"),
]
RayOut = Annotated[Path | None, typer.Option(help="With --ray: the folder of Parquet files to write")]
RayActors = Annotated[int, typer.Option(help="With --ray: processes that answer")]
