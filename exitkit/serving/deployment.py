"""The service as a Ray Serve deployment: replicas behind one address, and τ changed without a restart."""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitkit.common.errors import ArgumentError, ExitkitError
from exitkit.serving.settings import Settings

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

APPLICATION = "exitkit"
_BEYOND = 4
"""How many times ``max_queued`` requests reach a replica, which says 503 at once; more than these wait outside."""


def import_ray() -> Any:
    """Ray's top module.

    Raises:
        ExitkitError: it is not installed; the message names the extra.
    """
    try:
        import ray
        import ray.serve
    except ImportError as error:
        raise ExitkitError(f"this needs Ray: pip install 'exitkit[serve]' ({error})") from error
    return ray


class Replica:
    """What Ray Serve starts in each process."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        import torch

        from exitkit.common.allocator import keep_memory
        from exitkit.serving.ray_metrics import RayMetrics
        from exitkit.serving.service import load_service

        given = Settings(**settings)
        torch.set_num_threads(given.threads)
        keep_memory()
        self.metrics = RayMetrics(given.name)
        self.service = load_service(given, [self.metrics])

    async def __call__(self, request: Request) -> Response:
        from exitkit.serving.http import respond

        made = await respond(self.service, request)
        self.metrics.observe(self.service)
        return made

    def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Another τ for what comes from now on; None for the package's policy."""
        self.service.set_threshold(config["threshold"])


def application(settings: Settings) -> Any:
    """What ``ray.serve.run`` takes.

    Raises:
        ExitkitError: Ray is not installed.
    """
    serve = import_ray().serve
    deployment = serve.deployment(
        name=settings.name,
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.threads, "num_gpus": int(_on_gpu(settings))},
        max_ongoing_requests=_BEYOND * settings.max_queued,
        user_config={"threshold": settings.threshold},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=2 * settings.timeout_s,
    )(Replica)
    # Serve's own way to say that the code is what it was, so that a changed user_config reaches running replicas; without, it
    # draws a version at random, and starts all of them again
    return deployment.options(version=_version(settings), _internal=True).bind(
        asdict(replace(settings, threshold=None))
    )


def _version(settings: Settings) -> str:
    """The same for the same package and settings, whatever the threshold."""
    file = Path(settings.package).stat()
    same = (replace(settings, threshold=None), file.st_mtime_ns, file.st_size)
    return hashlib.sha256(repr(same).encode()).hexdigest()[:16]


def start(settings: Settings, host: str, port: int, metrics_port: int | None = None) -> None:
    """Serve on this machine, or in the Ray cluster that this process is connected to; returns once it answers.

    Args:
        settings: what is served.
        host, port: the address.
        metrics_port: where Prometheus reads, on this machine; None for any.

    Raises:
        ExitkitError: Ray is not installed; a package that cannot be served, which is looked at here first.
        ArgumentError: an address that is taken.
    """
    from exitkit.serving.service import load_service

    ray = import_ray()
    load_service(settings)
    _check_free(host, port)
    if not ray.is_initialized():
        start_ray(ray, settings.replicas * settings.threads + 2, metrics_port)
    ray.serve.start(http_options={"host": host, "port": port, "keep_alive_timeout_s": 30})
    deploy(settings)


def deploy(settings: Settings) -> None:
    """Start, or change what is running: another threshold alone restarts nothing."""
    import_ray().serve.run(application(settings), name=APPLICATION, route_prefix="/")


def start_ray(ray: Any, cpus: int, metrics_port: int | None = None) -> None:
    """Ray on this machine alone, on the loopback, without its dashboard and its reports of usage."""
    import os

    from ray._private import ray_constants

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # busy machines need more than its 5
    # as on macOS: Ray's own ports, which have no password, on the loopback alone
    ray_constants.ENABLE_RAY_CLUSTER = False
    ray.init(
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        _metrics_export_port=metrics_port,
        object_store_memory=200 * 2**20,
        logging_level="error",
    )


def serve_until_stopped(
    settings: Settings, host: str, port: int, metrics_port: int, reread: Callable[[], Settings] | None = None
) -> None:
    """Serve until SIGTERM or Ctrl-C; then answer what was taken. SIGHUP reads the threshold anew.

    Args:
        settings: what is served.
        host, port, metrics_port: the addresses.
        reread: the settings as they are now, asked for on SIGHUP; an error in them is said, and changes nothing.
    """
    from exitkit.common.console import make_console

    stop, changed, woken = threading.Event(), threading.Event(), threading.Event()

    def note(event: threading.Event) -> Callable[..., None]:
        def noted(*_: Any) -> None:
            event.set()
            woken.set()

        return noted

    signal.signal(signal.SIGHUP, note(changed))  # before: one that comes while it starts would end it
    start(settings, host, port, metrics_port)
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray, which sets a handler that ends at once
        signal.signal(number, note(stop))
    make_console().print(f"{settings.name} at http://{host}:{port}/  (stop with Ctrl-C)")
    while not stop.is_set():
        woken.wait()
        woken.clear()
        if changed.is_set() and reread is not None:
            changed.clear()
            settings = _changed(settings, reread)
    shut_down()


def shut_down() -> None:
    """Every request that was taken is answered; then all ends."""
    ray = import_ray()
    ray.serve.delete(APPLICATION)
    ray.serve.shutdown()
    ray.shutdown()


def _changed(settings: Settings, reread: Callable[[], Settings]) -> Settings:
    from exitkit.common.console import make_console

    try:
        new = replace(settings, threshold=reread().threshold)
        if new.threshold is not None:
            from exitkit.serving.service import load_service

            load_service(new)  # refuses a threshold that does not fit, before any replica sees it
        deploy(new)
    except ExitkitError as error:
        make_console().print(f"nothing was changed: {error}")
        return settings
    make_console().print(f"τ is {'that of the package' if new.threshold is None else new.threshold}")
    return new


def _on_gpu(settings: Settings) -> bool:
    return settings.device is not None and settings.device.startswith("cuda")


def _check_free(host: str, port: int) -> None:
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ArgumentError(
                f"--host {host} --port {port} cannot be listened on: {error.strerror}; name another"
            ) from error
