"""What a server survives: a replica that is killed, clients that leave or are slow, mutated bodies, many requests.

A part of ``benchmarks/serving.py``, which runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

import exitkit
from exitkit.common.console import make_console

PORT = 8791


def measure_faults(package: Path, engine: exitkit.Engine, inputs: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Statuses of every kind of mistreatment; each request is asked again until it has an answer, and compared."""
    from exitkit.serving import deployment
    from exitkit.serving.settings import Settings

    settings = Settings(str(package), name="m", trust=True, replicas=2, timeout_s=5, max_wait_ms=args.max_wait_ms)
    deployment.start(settings, "127.0.0.1", PORT)
    expected = [int(engine(inputs[at : at + 1]).exit) for at in range(16)]
    bodies = [_body(engine, inputs[at : at + 1]) for at in range(16)]
    asked = max(args.requests // 10, 20)
    found: dict[str, Any] = {"a replica killed": _while(lambda: _kill_one("Replica"), asked, bodies, expected)}
    found["clients that leave"] = _while(partial(_often, _leave, bodies[0], 50), asked, bodies, expected)
    found["slow clients"] = _while(partial(_often, _trickle, bodies[0], 3), asked, bodies, expected)
    found["mutated bodies"] = dict(Counter(_sent(_mutated(bodies[0], seed))[0] for seed in range(200)))
    before = _memory("Replica")
    found["many requests"] = _while(lambda: None, args.requests, bodies, expected)
    found["memory MB"] = {"before": before, "after": _memory("Replica")}
    deployment.shut_down()
    make_console().print(found, soft_wrap=True)
    return found


def _body(engine: exitkit.Engine, x: Tensor) -> bytes:
    entry = {"name": engine.inputs.names[0], "shape": [*x.shape], "datatype": "FP32", "data": x.flatten().tolist()}
    return json.dumps({"inputs": [entry], "outputs": [{"name": "exit"}]}).encode()


def _sent(body: bytes) -> tuple[int, Any]:
    """Status and document; 0 where there was no answer."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v2/models/m/infer", body, {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, None
    except (OSError, ValueError):
        return 0, None


def _while(
    fault: Callable[[], Any], requests: int, bodies: Sequence[bytes], expected: Sequence[int]
) -> dict[str, Any]:
    """Statuses of requests while something goes wrong; lost ones never came to an answer, wrong ones to another."""
    statuses: Counter[int] = Counter()

    def ask(number: int) -> str:
        for _ in range(20):
            status, document = _sent(bodies[number % len(bodies)])
            statuses[status] += 1
            if status == 200:
                return "right" if document["outputs"][0]["data"] == [expected[number % len(bodies)]] else "wrong"
            time.sleep(0.2)
        return "lost"

    trouble = threading.Timer(0.5, fault)
    trouble.start()
    with ThreadPoolExecutor(8) as clients:
        ends = Counter(clients.map(ask, range(requests)))
    trouble.join()
    return {"statuses": dict(statuses), **ends}


def _processes(title: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if text.startswith(b"ray::") and title.encode() in text:
            found.append(int(folder.name))
    return found


def _kill_one(title: str) -> None:
    os.kill(_processes(title)[0], signal.SIGKILL)


def _memory(title: str) -> list[float]:
    """Resident megabytes of each process."""
    sizes = [int((Path("/proc") / str(one) / "statm").read_text().split()[1]) for one in _processes(title)]
    return [size * os.sysconf("SC_PAGE_SIZE") / 2**20 for size in sizes]


def _often(mistreat: Callable[[bytes], None], body: bytes, times: int) -> None:
    for _ in range(times):
        mistreat(body)


def _leave(body: bytes) -> None:
    """Ask, and hang up."""
    with socket.create_connection(("127.0.0.1", PORT)) as connection:
        connection.sendall(_head(body) + body[: random.choice([10, len(body)])])


def _trickle(body: bytes) -> None:
    """Send a byte a second until the server has enough of it."""
    with socket.create_connection(("127.0.0.1", PORT)) as connection:
        connection.sendall(_head(body))
        for at in range(10):
            try:
                connection.sendall(body[at : at + 1])
            except OSError:
                return
            time.sleep(1)


def _head(body: bytes) -> bytes:
    lines = (
        "POST /v2/models/m/infer HTTP/1.1",
        "Host: h",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join((*lines, "", "")).encode()


def _mutated(body: bytes, seed: int) -> bytes:
    chance, changed = random.Random(seed), bytearray(body)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(min(len(changed), 200))
        changed[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
    return bytes(changed)
