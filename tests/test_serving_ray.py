"""What only Ray can show: actors and replicas. Ray starts once; the rest of serving is tested without it."""
# ruff: noqa: F811  (fixtures of other files)

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import exitkit
from tests.test_cli import invoke  # noqa: F401 - a fixture
from tests.test_reproduction import small  # noqa: F401 - a fixture
from tests.test_serving_http import picture

ray = pytest.importorskip("ray", reason="these need Ray: pip install 'exitkit[serve]'")
pytestmark = pytest.mark.ray


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    from exitkit.serving.deployment import start_ray

    paths = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])  # for the workers
    start_ray(ray, 3)
    yield
    ray.shutdown()
    os.environ["PYTHONPATH"] = paths


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes images of 3×4×4; about half of random ones leave at the first exit."""
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(48 if not at else 16, 16), nn.ReLU()) for at in range(2))
    backbone = nn.Sequential(nn.Flatten(), *blocks, nn.Linear(16, 3)).eval()
    x = torch.randn(200, 3, 4, 4)
    ee = exitkit.attach(backbone, x[:2], at=["1"], method="sdn").eval()
    threshold = float(exitkit.collect(ee, [x]).scores()[:, 0].median())
    path = tmp_path_factory.mktemp("package") / "pets.pt2"
    reader = exitkit.ImagePreprocessing((3, 4, 4), (0.5,) * 3, (0.5,) * 3)
    exitkit.export(ee, path, threshold=threshold, labels=["cat", "dog", "eel"], preprocessing=reader)
    return path


def workers(name: str) -> list[int]:
    """Processes of Ray's with this in their title."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::") and name.encode() in title:
            found.append(int(folder.name))
    return found


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        return [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


def asked(port: int, path: str, body: bytes | None = None, kind: str = "application/json") -> tuple[int, Any]:
    """Status and document."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"content-type": kind})
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def infer_body(port: int, x: torch.Tensor) -> bytes:
    name = asked(port, "/v2/models/pets")[1]["inputs"][0]["name"]
    entry = {"name": name, "shape": [*x.shape], "datatype": "FP32", "data": x.flatten().tolist()}
    return json.dumps({"inputs": [entry]}).encode()


def test_a_data_set_is_answered_as_by_the_engine_though_an_actor_is_killed(cluster: None, package: Path) -> None:
    from ray import data

    from exitkit.serving import predict

    x = torch.randn(640, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    def slowly(rows: Any) -> Any:
        time.sleep(0.1)
        return rows

    rows = data.from_numpy([*x.numpy().reshape(20, 32, 3, 4, 4)]).map_batches(slowly, batch_size=32, num_cpus=0.5)
    answered = predict(rows, package, column="data", block=32, actors=2, num_cpus=0.5, trust=True, keep_order=True)
    assert answered.context.execution_options.preserve_order
    assert not data.DataContext.get_current().execution_options.preserve_order
    exits, scores, killed = [], [], False
    for batch in answered.iter_batches(batch_size=32):
        exits += batch["exit"].tolist()
        scores += batch["score"].tolist()
        if not killed and (running := workers("MapBatches(Predictor")):
            os.kill(running[0], signal.SIGKILL)
            killed = True
    assert killed
    expected = exitkit.load(package, trust=True)(x)
    assert exits == expected.exit.tolist()
    np.testing.assert_allclose(scores, expected.score, rtol=1e-5)
    assert 0.2 < np.mean(exits) < 0.8


def test_a_folder_of_images_becomes_parquet(cluster: None, package: Path, tmp_path: Path) -> None:
    from pyarrow import parquet

    from exitkit.serving.ray_files import write_predictions

    (tmp_path / "images").mkdir()
    for number, grey in enumerate((0, 90, 255)):
        (tmp_path / "images" / f"{number}.png").write_bytes(picture(grey=grey))
    (tmp_path / "images" / "bad.png").write_bytes(b"nothing")
    out = tmp_path / "predictions.parquet"
    said = write_predictions(package, str(tmp_path / "images"), None, out, actors=1, trust=True)
    assert said.startswith("3 answered: ")
    assert "1 could not be read" in said
    records = {Path(one["path"]).name: one for one in parquet.read_table(out).to_pylist()}
    assert records["bad.png"]["error"].startswith("'the image' cannot be read")
    loaded = exitkit.load(package, trust=True)
    assert loaded.description is not None
    made: Any = loaded.description.preprocessing
    for number, grey in enumerate((0, 90, 255)):
        answer = loaded(made([np.full((4, 4, 3), grey, np.uint8)]))
        assert records[f"{number}.png"]["label"] == ["cat", "dog", "eel"][int(answer.logits.argmax())]
        assert records[f"{number}.png"]["exit"] == int(answer.exit)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(exitkit.ExitkitError, match=r"cut.parquet' cannot be answered"):
        write_predictions(package, str(tmp_path / "cut.parquet"), None, tmp_path / "none", actors=1, trust=True)
    with pytest.raises(exitkit.ArgumentError, match="is there already"):
        write_predictions(package, str(tmp_path / "images"), None, out, actors=1, trust=True)


def test_a_table_of_a_paper_runs_on_a_cluster(cluster: None, small: None, invoke: Any, tmp_path: Path) -> None:
    """A backbone, then the exits that begin from it, each in a process of its own; a fault is told as its row's."""
    _, printed, complained = invoke("reproduce", "small", "1", "--out", tmp_path / "out", "--ray", "local")
    assert "1 of 3 rows failed: wrong" in complained
    assert "nowhere" in printed
    sdn = json.loads((tmp_path / "out" / "small-1-smoke.json").read_text())["rows"][0]
    outputs = exitkit.ExitOutputs.load(Path(sdn["runs"]) / "seed-0" / "outputs-sdn.safetensors")
    assert sdn["numbers"][0] == [100 * outputs.curve().at_budget(0.6).accuracy]


def test_replicas_answer_over_http_and_change_their_threshold_without_a_restart(cluster: None, package: Path) -> None:
    from exitkit.serving import deployment
    from exitkit.serving.settings import Settings

    settings = Settings(str(package), trust=True)
    (port,) = free_ports(1)
    deployment.start(settings, "127.0.0.1", port)

    sent = partial(asked, port)
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    expected = exitkit.load(package, trust=True)(x)
    body = infer_body(port, x)

    def exits() -> Any:
        status, document = sent("/v2/models/pets/infer", body)
        assert status == 200
        return next(one["data"] for one in document["outputs"] if one["name"] == "exit")

    assert exits() == expected.exit.tolist()
    status, document = sent("/predict", picture(), "image/png")
    assert status == 200
    assert document["label"] in ("cat", "dog", "eel")
    assert sent("/predict", b"nothing", "image/png")[0] == 400
    deployment.deploy(replace(settings, threshold=2.0))
    assert exits() == [1] * 8
    assert sent("/status")[1]["last_minute"]["answers"] == 17  # the same process
    deployment.deploy(settings)
    assert exits() == expected.exit.tolist()
    ray.serve.shutdown()


def until(holds: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait; a process that ended meanwhile fails the test with what it said."""
    end = time.monotonic() + seconds
    while True:
        try:
            if holds():
                return
        except (OSError, ValueError):  # nothing listens, or knows the address yet
            pass
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.3)


def test_the_command_rereads_its_threshold_tells_prometheus_and_answers_what_it_took(
    package: Path, tmp_path: Path
) -> None:
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    expected = exitkit.load(package, trust=True)(x).exit.tolist()
    settings = tmp_path / "serve.yaml"
    settings.write_text(f"package: {package}\ntrust: true\nmax_wait_ms: 4000\n")
    port, metrics = free_ports(2)
    command = [sys.executable, "-m", "exitkit", "serve", "--config", str(settings)]
    root = str(Path(__file__).resolve().parents[1])
    process = subprocess.Popen(
        [*command, "--port", str(port), "--metrics-port", str(metrics)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    try:
        until(lambda: asked(port, "/v2/models/pets")[0] == 200, process)
        body = infer_body(port, x)

        def exits() -> list[int]:
            status, document = asked(port, "/v2/models/pets/infer", body)
            assert status == 200, document
            return next(one["data"] for one in document["outputs"] if one["name"] == "exit")  # type: ignore[no-any-return]

        assert exits() == expected

        def told() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=20) as reply:
                return str(reply.read().decode())

        wanted = set(re.findall(r"ray_exitkit_(?!shift)\w+", (Path(root) / "examples" / "grafana.json").read_text()))
        assert len(wanted) == 5
        until(lambda: all(f"{name}{{" in told() for name in wanted), process, 60)
        settings.write_text(settings.read_text() + "threshold: 2.0\n")
        process.send_signal(signal.SIGHUP)
        until(lambda: exits() == [1] * 8, process, 60)
        with ThreadPoolExecutor(1) as client:
            answer = client.submit(exits)
            time.sleep(0.5)  # the request is taken, and held back for a fuller batch
            process.send_signal(signal.SIGTERM)
            assert answer.result(30) == [1] * 8
        assert process.wait(60) == 0
    finally:
        process.kill()
