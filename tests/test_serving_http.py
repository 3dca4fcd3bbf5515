"""The server's addresses, limits and errors, without Ray: requests go straight to what answers them."""

from __future__ import annotations

import asyncio
import io
import json
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import exitkit
from exitkit import ImagePreprocessing, TextPreprocessing
from exitkit.engine.program import Description
from exitkit.serving.service import Service
from exitkit.serving.settings import Settings
from exitkit.serving.statistics import LastMinute
from tests.stages import sample, staged_engine

pytest.importorskip("starlette", reason="the server needs: pip install 'exitkit[serve]'")
from starlette.requests import Request

from exitkit.serving.http import respond

LABELS = ("cat", "dog", "eel")
COSTS = (("a", 0.25), ("b", 0.5), ("backbone", 1.1))


def service(**settings: Any) -> Service:
    engine, _ = staged_engine(Description(LABELS, None, COSTS))
    return Service(engine, Settings("models/pets.pt2", **settings))


async def sent(to: Service, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> Any:
    """Status and document of a response."""
    parts = [
        {"type": "http.request", "body": body[at : at + 4096], "more_body": True} for at in range(0, len(body), 4096)
    ]
    waiting = iter([*parts, {"type": "http.request", "body": b"", "more_body": False}])
    return await received(to, method, path, waiting, kind)


async def received(
    to: Service, method: str, path: str, messages: Iterator[Any], kind: str = "application/json"
) -> Any:
    async def receive() -> Any:
        return next(messages, {"type": "http.disconnect"})

    path, _, query = path.partition("?")
    headers = [(b"host", b"here"), (b"content-type", kind.encode())]
    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": headers}
    made = await respond(to, Request(scope, receive))
    return made.status_code, json.loads(bytes(made.body)) if made.media_type == "application/json" else bytes(
        made.body
    )


def once(to: Service, method: str, path: str, body: Any = b"", kind: str = "application/json") -> Any:
    """One request in an event loop of its own."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def run() -> Any:
        answer = await sent(to, method, path, content, kind)
        await to.scheduler.close()
        return answer

    return asyncio.run(asyncio.wait_for(run(), 30))


def tensor(**changes: Any) -> dict[str, Any]:
    """A request of two samples: one leaves at exit 0, one at exit 1."""
    rows = torch.cat([sample(0, 0.5), sample(1, 2.0)])
    entry = {"name": "x", "shape": [2, 3], "datatype": "FP32", "data": rows.flatten().tolist(), **changes}
    return {"inputs": [{key: value for key, value in entry.items() if value is not None}]}


INFER = "/v2/models/pets/infer"


def test_the_protocol_answers_as_the_engine() -> None:
    status, document = once(service(), "POST", INFER, {**tensor(), "id": "seven"})
    assert (status, document["model_name"], document["id"]) == (200, "pets", "seven")
    outputs = {one["name"]: (one["datatype"], one["shape"], one["data"]) for one in document["outputs"]}
    assert outputs == {
        "logits": ("FP32", [2, 3], [1.0, 0.0, 0.5, 0.0, 2.0, 4.0]),  # x times the exit's number plus one
        "label": ("INT64", [2], [0, 2]),
        "exit": ("INT64", [2], [0, 1]),
        "score": ("FP64", [2], [1.0, 1.0]),
        "non_finite": ("BOOL", [2], [False, False]),
        "label_name": ("BYTES", [2], ["cat", "eel"]),
    }
    nested = tensor(data=torch.cat([sample(0, 0.5), sample(1, 2.0)]).tolist())
    chosen = {**nested, "outputs": [{"name": "exit"}], "parameters": {"threshold": 1.0}}
    status, document = once(service(), "POST", INFER, chosen)
    assert [(one["name"], one["data"]) for one in document["outputs"]] == [("exit", [2, 2])]
    _, document = once(service(), "POST", INFER, {**tensor(), "parameters": {"threshold": [1.0, 0.5]}})
    assert next(one["data"] for one in document["outputs"] if one["name"] == "exit") == [2, 1]


def test_metadata_and_health() -> None:
    status, document = once(service(), "GET", "/v2/models/pets")
    assert status == 200
    assert document["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    assert {one["name"]: one["shape"] for one in document["outputs"]}["logits"] == [-1, 3]
    for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/pets/ready"):
        assert once(service(), "GET", path)[0] == 200


class TwoInputs(nn.Module):
    """Takes a feature and what it is weighted by; which is which shows in the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, weight: Tensor, feature: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(feature)) * weight)


def test_inputs_are_called_as_the_models_arguments_are() -> None:
    """They had the names of the graph, ``tensors_0`` and so on, and three of one shape could not be told apart."""
    torch.manual_seed(0)
    model, given = TwoInputs().eval(), {"weight": torch.rand(2, 3), "feature": torch.rand(2, 3)}
    to = Service(exitkit.compile(exitkit.attach(model, given, at=["first"]), 2.0), Settings("models/pets.pt2"))
    _, document = once(to, "GET", "/v2/models/pets")
    assert {one["name"] for one in document["inputs"]} == {"weight", "feature"}
    entries = [{**tensor(data=x.flatten().tolist())["inputs"][0], "name": name} for name, x in given.items()]
    for inputs in (entries, entries[::-1]):
        to = Service(to.engine, to.settings)
        _, document = once(to, "POST", INFER, {"inputs": inputs})
        logits = next(one["data"] for one in document["outputs"] if one["name"] == "logits")
        with torch.no_grad():
            assert torch.allclose(torch.tensor(logits).reshape(2, 3), model(**given), atol=1e-6)


class Words(nn.Module):
    """Four words, and how much each counts."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.last = nn.Embedding(4, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.last(torch.relu(self.first((self.words(ids) * mask[..., None]).sum(1))))


@pytest.mark.parametrize(
    ("ids", "mask", "said"),
    [([0, 3, 4], [1, 1, 1], "'ids' holds 4, and the model knows 0 to 3"), ([0, 1, 2], [1, 1], "[3, 2] tokens")],
)
def test_texts_that_no_model_can_read_are_the_clients_error(ids: list[int], mask: list[int], said: str) -> None:
    """They ended compiled models, and the server with them."""
    example = {"ids": torch.zeros(2, 3, dtype=torch.long), "mask": torch.ones(2, 3, dtype=torch.long)}
    engine = exitkit.compile(exitkit.attach(Words().eval(), example, at=["first"]), 2.0)
    given = [
        {"name": name, "datatype": "INT64", "shape": [1, len(data)], "data": data}
        for name, data in {"ids": ids, "mask": mask}.items()
    ]
    status, document = once(Service(engine, Settings("models/pets.pt2")), "POST", INFER, {"inputs": given})
    assert status == 400
    assert said in document["error"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"inputs": NaN}', "no JSON"),
        (b"[]", "must be a JSON object"),
        ({}, "inputs must be a list"),
        ({**tensor(), "model": 1}, "unknown fields ['model']"),
        ({**tensor(), "id": 7}, "id=7 must be"),
        (tensor(name="y"), "this model takes ['x']"),
        ({"inputs": [*tensor()["inputs"], *tensor()["inputs"]]}, "'x' twice"),
        (tensor(datatype="FP64"), "this model takes 'FP32'"),
        (tensor(shape=[2, 4]), "6 values in 'data', and its shape [2, 4] asks for 8"),
        (tensor(shape=[-1, 3]), "give a list of sizes"),
        (tensor(shape=[3, 2]), "has shape (3, 2)"),
        (tensor(data=["1"] * 6), "a list of numbers"),
        (tensor(data=[[1.0, 2.0], [1.0]]), "a list of numbers"),
        (tensor(data=[True] * 6), "another kind than FP32"),
        (tensor(data=None), "needs 'data'"),
        (tensor(shape=[0, 3], data=[]), "a request of 0 samples"),
        (tensor(shape=[9, 3], data=[0.0] * 27), "at most 8 at once"),
        (tensor(parameters={"binary_data_size": 24}), "as JSON numbers in 'data' alone"),
        ({**tensor(), "parameters": {"threshold": "high"}}, "parameters.threshold='high' must be"),
        ({**tensor(), "parameters": {"threshold": [0.5] * 3}}, "threshold has 3 values"),
        ({**tensor(), "parameters": {"tau": 1}}, "unknown fields ['tau']"),
        ({**tensor(), "outputs": [{"name": "nothing"}]}, "outputs ['nothing'] are unknown"),
    ],
)  # fmt: skip
def test_what_is_not_the_protocol_is_one_clear_error(body: Any, said: str) -> None:
    status, document = once(service(max_queued=8), "POST", INFER, body)
    assert status == 400
    assert said in document["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v2/models/cats", 404), ("GET", INFER, 405), ("POST", "/", 405)],
)
def test_unknown_addresses(method: str, path: str, status: int) -> None:
    assert once(service(), method, path)[0] == status


def test_mutated_bodies_are_answered_or_refused() -> None:
    """Never an exception, never a status that blames the server."""
    content, chance = json.dumps({**tensor(), "id": "a", "parameters": {"threshold": 0.5}}).encode(), random.Random(0)
    to, statuses = service(max_queued=8), set()

    async def run() -> None:
        for _ in range(200):
            body = bytearray(content)
            for _ in range(chance.randint(1, 4)):
                at = chance.randrange(len(body))
                body[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
            statuses.add((await sent(to, "POST", INFER, bytes(body)))[0])
        assert to.scheduler.queued == 0
        await to.scheduler.close()

    asyncio.run(asyncio.wait_for(run(), 30))
    assert statuses <= {200, 400}
    assert 400 in statuses


def test_too_large_a_body_is_refused_before_it_is_all_there() -> None:
    read = 0

    def endless() -> Iterator[Any]:
        nonlocal read
        while True:
            read += 1
            yield {"type": "http.request", "body": b" " * 65536, "more_body": True}

    status, document = asyncio.run(received(service(max_body_mb=0.5), "POST", INFER, endless()))
    assert (status, document["error"]) == (413, "the body is larger than 0.5 MB")
    assert read == 9


def test_a_client_that_sends_nothing_or_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    to = service(timeout_s=0.05)

    async def slow() -> AsyncIterator[bytes]:
        await asyncio.sleep(20)
        yield b""

    monkeypatch.setattr(Request, "stream", lambda self: slow())
    assert once(to, "POST", INFER)[0] == 408
    monkeypatch.undo()
    status, _ = asyncio.run(
        received(to, "POST", INFER, iter([{"type": "http.request", "body": b"{", "more_body": True}]))
    )
    assert status == 499


def test_overload_and_slow_answers_have_statuses_of_their_own() -> None:
    engine, stages = staged_engine()
    stages[0].open.clear()
    to = Service(engine, Settings("pets.pt2", max_queued=2, timeout_s=0.3))
    body = json.dumps(tensor()).encode()

    async def run() -> None:
        first = asyncio.create_task(sent(to, "POST", INFER, body))
        await asyncio.to_thread(stages[0].entered.wait, 20)
        status, document = await sent(to, "POST", INFER, body)
        assert status == 503
        assert "2 samples are under way" in document["error"]
        assert (await first)[0] == 504
        assert to.scheduler.queued == 0
        stages[0].open.set()
        assert (await sent(to, "POST", INFER, body))[0] == 200
        await to.scheduler.close()

    asyncio.run(asyncio.wait_for(run(), 30))
    assert to.last_minute.statuses == {503: 1, 504: 1, 200: 1}


def test_a_model_that_fails_is_the_servers_fault() -> None:
    status, document = once(service(), "POST", INFER, tensor(data=[0.0, 0.0, 666.0] * 2))
    assert status == 500
    assert "RuntimeError: poisoned" in document["error"]


def test_the_policy_is_changed_without_a_restart() -> None:
    to = service()

    async def exits(threshold: Any) -> Any:
        to.set_threshold(threshold)
        status, document = await sent(to, "POST", INFER, json.dumps(tensor()).encode())
        assert status == 200
        return next(one["data"] for one in document["outputs"] if one["name"] == "exit")

    async def run() -> list[Any]:
        found = [await exits(threshold) for threshold in (None, 1.0, (1.0, 0.5), None)]
        await to.scheduler.close()
        return found

    assert asyncio.run(run()) == [[0, 1], [2, 2], [2, 1], [0, 1]]


def test_status_tells_of_the_last_minute() -> None:
    to = service()

    async def run() -> Any:
        await sent(to, "POST", INFER, json.dumps(tensor()).encode())
        found = await sent(to, "GET", "/status")
        await to.scheduler.close()
        return found

    status, document = asyncio.run(run())
    assert status == 200
    assert document["last_minute"]["exits"] == [1, 1, 0]
    assert document["costs"] == [0.25, 0.5, 1.1]
    assert document["monitor"] is None
    assert document["replicas"] == 1
    now = 0.0
    minute = LastMinute(lambda: now)
    for now in (0.0, 30.0, 70.0):  # noqa: B007 - the clock reads it
        minute.answered(to.last_minute.recent()[0])
    assert len(minute.recent()) == 2


def test_texts_and_pairs_of_them_and_what_was_cut() -> None:
    """Long texts were cut without a word, and pairs could not be sent."""
    from tests.test_inputs import bert, tokenizer

    words, model = tokenizer(), bert("Bert", 8)
    pair = dict(words("good film", "bad", return_tensors="pt", return_token_type_ids=True))
    ee = exitkit.attach(model, {key: value.expand(2, -1) for key, value in pair.items()}, every=1, method="sdn")
    reader = TextPreprocessing.of(words, ee.example.spec.keys, model=model)
    described = Description(None, reader, tuple((f"{m}", 1.0) for m in range(len(ee.exits))))
    engine = replace(exitkit.compile(ee, 2.0), description=described)

    def score(**tokens: Tensor) -> float:
        with torch.no_grad():
            return float(model(**tokens).logits.softmax(1).max())

    for body, kind, expected, cut in [
        ({"text": "good film", "text_pair": "bad"}, "application/json", score(**pair), False),
        ({"text": "good film"}, "application/json", score(**words("good film", return_tensors="pt")), False),
        (b"good film", "text/plain", score(**words("good film", return_tensors="pt")), False),
        (b"good " * 9, "text/plain", score(**words("good " * 8, return_tensors="pt")), True),
    ]:
        status, document = once(Service(engine, Settings("m.pt2")), "POST", "/predict", body, kind)
        assert (status, document["cut"]) == (200, cut)
        assert document["score"] == pytest.approx(expected, abs=1e-5)
    for wrong in (
        {"text": ["good", "bad"]},
        {"text_pair": "bad"},
        {"text": "a", "text_pair": 1},
        {"text": "a", "b": "c"},
    ):
        status, document = once(Service(engine, Settings("m.pt2")), "POST", "/predict", wrong)
        assert (status, document["error"].startswith("the body must be")) == (400, True)


def picture(width: int = 4, height: int = 4, form: str = "PNG", grey: int = 255) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), grey, np.uint8)).save(out, form)
    return out.getvalue()


def image_service(**settings: Any) -> Service:
    """Takes (B, 3): an image of one pixel and three channels, flattened."""
    engine, _ = staged_engine(Description(LABELS, ImagePreprocessing((3, 1, 1), (0.0,) * 3, (1.0,) * 3), COSTS))
    program = engine.loop.program
    first = program.steps[0]
    inputs = replace(program.inputs, sizes=((None, 3, 1, 1),))
    flat = replace(first, run=lambda x: first.run(x.flatten(1)))
    loop = replace(engine.loop, program=replace(program, inputs=inputs, steps=(flat, *program.steps[1:])))
    return Service(replace(engine, loop=loop), Settings("pets.pt2", **settings))


def test_an_uploaded_image_is_answered_in_words() -> None:
    status, document = once(image_service(), "POST", "/predict", picture(), "image/png")
    assert status == 200
    assert document.pop("milliseconds") > 0
    assert document == {"label": "cat", "exit": 0, "score": 1.0, "cost": 0.25, "guaranteed": False}
    assert once(image_service(), "POST", "/predict?threshold=inf", picture(), "image/png")[1]["exit"] == 2


@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "said"),
    [
        ("/predict", picture(20, 20, "JPEG")[:-20], "image/jpeg", 400, "cannot be read as an image"),
        ("/predict", b"not an image", "image/png", 400, "no image"),
        ("/predict", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "image/eps", 400, "no image"),
        ("/predict", picture(40, 40), "image/png", 413, "40 x 40 pixels; at most 1000 are taken"),
        ("/predict", b"a text", "text/plain", 415, "send the image's file itself"),
        ("/predict", picture(), "multipart/form-data; boundary=x", 415, "send the image's file itself"),
        ("/predict?threshold=high", picture(), "image/png", 400, "must be a number"),
        ("/predict?threshold=nan", picture(), "image/png", 400, "must be a number"),
        ("/predict?tau=1", picture(), "image/png", 400, "?threshold= alone"),
    ],
)
def test_bad_uploads(path: str, body: bytes, kind: str, status: int, said: str) -> None:
    got, document = once(image_service(max_pixels=1000), "POST", path, body, kind)
    assert (got, said in document["error"]) == (status, True), document
