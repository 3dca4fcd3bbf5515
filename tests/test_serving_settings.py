"""What a server is started with, and what is refused before anything starts; without Ray."""

from __future__ import annotations

import asyncio
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import exitkit
from exitkit import ExitkitError, Guarantee
from exitkit.serving import cluster, deployment, service
from exitkit.serving.service import Service, load_service
from exitkit.serving.settings import Settings, read_settings
from tests.stages import sample, staged_engine

pytest.importorskip("yaml")


def test_a_file_and_what_stands_above_it(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("package: models/my pets.v2.pt2\nthreshold: [0.5, 0.25]\nmax_wait_ms: 5\nreplicas: 2\n")
    found = read_settings(file, replicas=3, device=None)
    assert found == Settings("models/my pets.v2.pt2", threshold=(0.5, 0.25), max_wait_ms=5.0, replicas=3)
    assert found.name == "my-pets"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("package: m.pt2\nthreshhold: 0.5\n", "'threshhold' is unknown"),
        ("threshold: 0.5\n", "'package' is missing"),
        ("package: m.pt2\nreplicas: 0\n", "replicas=0 must be a whole number at least 1"),
        ("package: m.pt2\nthreshold: high\n", "threshold='high' must be"),
        ("package: m.pt2\nname: a/b\n", "name='a/b' must be"),
        ("- a\n", "must hold keys and values"),
        ("a: [\n", "cannot be read as YAML"),
        ("package: !!python/object/apply:os.system [ls]\n", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "serve.yaml").write_text(text)
    with pytest.raises(ExitkitError) as error:
        read_settings(tmp_path / "serve.yaml")
    assert said in str(error.value)
    with pytest.raises(ExitkitError, match=r"none.yaml' cannot be read"):
        read_settings(tmp_path / "none.yaml")


def test_one_graph_cannot_be_scheduled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "load", lambda *_, **__: object())
    with pytest.raises(exitkit.ArgumentError, match=r"export it as \.pt2, or as \.onnx\.zip"):
        load_service(Settings("m.onnx"))


def test_not_a_package(tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(b"nothing")
    with pytest.raises(ExitkitError, match=r"m\.pt2"):
        load_service(Settings(str(tmp_path / "m.pt2"), trust=True))


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ExitkitError, match=r"pip install 'exitkit\[serve\]'"):
        deployment.import_ray()


def test_an_address_that_is_taken_and_one_where_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            exitkit.ArgumentError, match=f"--port {port} cannot be listened on: Address already in use"
        ):
            deployment._check_free("127.0.0.1", port)
    with pytest.raises(exitkit.ArgumentError, match="nothing listens there"):
        cluster.connect(None, f"ray://127.0.0.1:{port}", 1)


PROMISE = Guarantee("at most 1 point", True, "drop", "ltt", 0.01, 0.95, 0.0, 100, 0.4, (0.3, 0.5))


class _Monitor:
    alarm = False

    def __init__(self) -> None:
        self.seen: list[int] = []

    def update(self, exit: Any, score: Any) -> None:
        self.seen += exit.tolist()


def test_a_guarantee_ends_with_another_threshold_or_a_shift() -> None:
    engine, _ = staged_engine()
    policy = replace(engine.policy, guarantee=PROMISE)
    monitor = _Monitor()
    watched = replace(engine, loop=replace(engine.loop, policy=policy), monitor=monitor)  # type: ignore[arg-type]
    to = Service(watched, Settings("m.pt2"))

    async def run() -> list[bool]:
        found = [(await to.answer(sample(0))).guaranteed, (await to.answer(sample(1), 0.4)).guaranteed]
        to.set_threshold(0.4)
        found.append((await to.answer(sample(1))).guaranteed)
        to.set_threshold(None)
        found.append((await to.answer(sample(2))).guaranteed)
        monitor.alarm = True
        found.append((await to.answer(torch.cat([sample(0), sample(1)]))).guaranteed)
        await to.scheduler.close()
        return found

    assert asyncio.run(run()) == [True, False, False, True, False]
    assert monitor.seen == [0, 2, 0, 1]  # answers at the package's own policy alone


def test_a_request_keeps_the_guarantee_of_the_policy_that_it_came_under() -> None:
    """It was told of the policy at its end: another τ than the package's had been called guaranteed."""
    engine, stages = staged_engine()
    policy = replace(engine.policy, guarantee=PROMISE)
    to = Service(replace(engine, loop=replace(engine.loop, policy=policy)), Settings("pets.pt2", threshold=1.0))
    stages[0].open.clear()

    async def run() -> list[bool]:
        first = asyncio.create_task(to.answer(sample(0)))
        await asyncio.to_thread(stages[0].entered.wait, 20)
        to.set_threshold(None)
        second = asyncio.create_task(to.answer(sample(0)))
        await asyncio.sleep(0)
        stages[0].open.set()
        replies = await asyncio.gather(first, second)
        await to.scheduler.close()
        return [reply.guaranteed for reply in replies]

    assert asyncio.run(asyncio.wait_for(run(), 30)) == [False, True]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve"], "name the PACKAGE to serve"),
        (["serve", "m.pt2", "--port", "0"], "--port 0 must be from 1 to 65535"),
        (["run", "m.pt2", "photos", "--ray", "local"], "--ray and --out go together"),
        (["run", "m.pt2", "a", "b", "--ray", "local", "--out", "x"], "--ray takes one place with inputs, not 2"),
        (["run", "m.pt2", "a", "--ray", "local", "--out", "."], "--out '.' is there already"),
    ],
)
def test_the_commands_refuse_before_anything_starts(arguments: list[str], said: str) -> None:
    runner = pytest.importorskip("typer.testing").CliRunner()
    from exitkit.cli.app import app

    with pytest.raises(exitkit.ArgumentError) as error:
        runner.invoke(app, arguments, catch_exceptions=False)
    assert said in str(error.value)
