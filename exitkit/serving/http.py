"""HTTP: addresses, limits, and errors as statuses. Needs Starlette, which comes with Ray Serve."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from functools import cache
from importlib.resources import files
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response

from exitkit.common.errors import ArgumentError, ExitkitError
from exitkit.common.schema import to_json
from exitkit.common.versions import installed_versions
from exitkit.packages.answers import said
from exitkit.serving.protocol import finite, metadata, output_names, read_request, response
from exitkit.serving.scheduling import StageError, UnavailableError
from exitkit.serving.service import Reply, Service
from exitkit.serving.uploads import TooLargeError, UnknownKindError, upload_of

Handler = Callable[[Service, Request], Awaitable[Response]]
_MODEL = r"/v2/models/([\w.-]+)"
_STATUSES: list[tuple[type[BaseException], int]] = [
    (UnavailableError, 503), (StageError, 500), (TooLargeError, 413), (UnknownKindError, 415), (ExitkitError, 400),
]  # fmt: skip
"""Of errors, the first that fits."""
_GONE = 499
"""Nobody reads it: the client has left."""
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}


class _RefusedError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def respond(service: Service, request: Request) -> Response:
    """The response to any request; never an exception but that the caller was cancelled."""
    try:
        made = await _handler(service, request)(service, request)
    except _RefusedError as error:
        made = _error(error.status, str(error))
    except TimeoutError:
        made = _error(504, f"no answer within {service.settings.timeout_s:g} s; send the request again later")
    except ClientDisconnect:
        made = _error(_GONE, "the client has left")
    except ExitkitError as error:
        made = _error(next(status for kind, status in _STATUSES if isinstance(error, kind)), str(error))
    for observer in service.observers:
        observer.responded(made.status_code)
    return made


def _handler(service: Service, request: Request) -> Handler:
    path, allowed = request.url.path, []
    for method, pattern, handler in _ROUTES:
        if found := re.fullmatch(pattern, path):
            if found.groups() and found[1] != service.settings.name:
                raise _RefusedError(
                    404, f"model {found[1][:80]!r} is unknown; this server has {service.settings.name!r}"
                )
            if request.method == method:
                return handler
            allowed.append(method)
    if allowed:
        raise _RefusedError(405, f"{request.method} {path[:80]} is not allowed; use {' or '.join(allowed)}")
    raise _RefusedError(404, f"{path[:80]!r} is unknown; see /, /predict, /status and /v2")


async def _page(service: Service, request: Request) -> Response:
    return HTMLResponse(_html(), headers=_HEADERS)


@cache
def _html() -> str:
    return (files("exitkit.serving") / "page.html").read_text(encoding="utf-8")


async def _status(service: Service, request: Request) -> Response:
    return _json(service.status())


async def _predict(service: Service, request: Request) -> Response:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    threshold = _query_threshold(request)
    body = await _body(service, request)
    preprocessing = None if service.engine.description is None else service.engine.description.preprocessing
    upload = await asyncio.to_thread(upload_of, kind, body, preprocessing, service.settings.max_pixels)
    reply = await service.answer(service.engine.inputs.placed(upload.batch), threshold)
    return _json(_record(service, reply) | ({} if upload.cut is None else {"cut": upload.cut}))


async def _infer(service: Service, request: Request) -> Response:
    body = await _body(service, request)
    outputs = output_names(service.engine.loop.program.num_classes, service.labels)
    asked = await asyncio.to_thread(read_request, body, service.engine.inputs, outputs)
    reply = await service.answer(asked.batch, asked.threshold)
    document = response(service.settings.name, asked, reply.prediction, service.labels)
    return _json({**document, "parameters": {"milliseconds": reply.milliseconds, "guaranteed": reply.guaranteed}})


async def _server(service: Service, request: Request) -> Response:
    return _json({"name": "exitkit", "version": installed_versions()["exitkit"], "extensions": []})


async def _model(service: Service, request: Request) -> Response:
    return _json(metadata(service.settings.name, service.engine, service.labels))


async def _alive(service: Service, request: Request) -> Response:
    return _json({"live": True, "ready": True, "name": service.settings.name})


_ROUTES: list[tuple[str, str, Handler]] = [
    ("GET", "/", _page), ("GET", "/status", _status), ("POST", "/predict", _predict),
    ("GET", "/v2/?", _server), ("GET", "/v2/health/(?:live|ready)", _alive),
    ("GET", _MODEL, _model), ("GET", f"{_MODEL}/ready", _alive), ("POST", f"{_MODEL}/infer", _infer),
]  # fmt: skip
"""Method, path, and what answers; a group in a path is the model's name."""


async def _body(service: Service, request: Request) -> bytes:
    """All of a request's body, within the limits of size and time."""
    most = int(service.settings.max_body_mb * 2**20)
    parts, size = [], 0
    try:
        async with asyncio.timeout(service.settings.timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise _RefusedError(413, f"the body is larger than {service.settings.max_body_mb:g} MB")
                parts.append(part)
    except TimeoutError:
        raise _RefusedError(408, f"the body did not come within {service.settings.timeout_s:g} s") from None
    return b"".join(parts)


def _query_threshold(request: Request) -> float | None:
    """``?threshold=0.8``; ``inf`` lets no sample leave before the backbone's own classifier."""
    if unknown := sorted(set(request.query_params) - {"threshold"}):
        raise ArgumentError(f"{unknown[0][:40]!r} is unknown; /predict takes ?threshold= alone")
    given = request.query_params.get("threshold")
    if given is None:
        return None
    try:
        return float(given)
    except ValueError:
        raise ArgumentError(f"threshold={given[:40]!r} must be a number") from None


def _record(service: Service, reply: Reply) -> dict[str, Any]:
    """One answer in words."""
    logits, exit_, score, _ = (column[0] for column in reply.prediction)
    return {
        **said(logits, service.labels),
        "exit": int(exit_),
        "score": finite([float(score)])[0],
        "cost": service.cost(int(exit_)),
        "milliseconds": reply.milliseconds,
        "guaranteed": reply.guaranteed,
    }


def _json(document: Any, status: int = 200) -> Response:
    return Response(
        to_json(document), status, media_type="application/json", headers={"x-content-type-options": "nosniff"}
    )


def _error(status: int, message: str) -> Response:
    headers = {"retry-after": "1"} if status == 503 else None
    made = _json({"error": message}, status)
    made.headers.update(headers or {})
    return made
