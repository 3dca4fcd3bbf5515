"""One model, many threads: every call gives what it gives alone."""

from __future__ import annotations

import copy
import faulthandler
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import exitkit
from exitkit import MultiExitModel, NotCapturableError
from tests.toy import TinyNet, all_equal, images, noisy

THREADS, CALLS = 8, 400
Call = Callable[[MultiExitModel, Tensor], tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _eager_switches() -> Iterator[None]:
    """Threads take turns after microseconds instead of milliseconds, so that a race shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(autouse=True)
def _no_endless_wait() -> Iterator[None]:
    """Threads that wait for one another forever end the run, and it shows where each of them stands."""
    faulthandler.dump_traceback_later(600, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def ee(tiny_net: TinyNet) -> MultiExitModel:
    return noisy(exitkit.attach(tiny_net, images(), every=1, method="ztw"))


def everything(ee: MultiExitModel, x: Tensor) -> tuple[Tensor, ...]:
    output = ee(x)
    return (*output.logits, *output.features, *output.heads)


def heads(ee: MultiExitModel, x: Tensor) -> tuple[Tensor, ...]:
    features, logits = ee.run_heads(x)
    return (*features, *logits)


def stopped(ee: MultiExitModel, x: Tensor) -> tuple[Tensor, ...]:
    return ee.run_until(1, x)[0]


def mixed(ee: MultiExitModel, x: Tensor) -> tuple[Tensor, ...]:
    """Another call from one input to the next."""
    kinds: tuple[Call, ...] = (everything, heads, stopped)
    return kinds[int(x[0, 0, 0, 0] * 1000) % 3](ee, x)


def inputs(count: int) -> list[Tensor]:
    return [torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def in_threads(call: Call, ee: MultiExitModel, batches: list[Tensor]) -> list[tuple[Tensor, ...]]:
    def one(x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return call(ee, x)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, batches))


@pytest.mark.parametrize("call", [everything, heads, stopped, mixed])
def test_every_thread_gets_the_answers_to_its_own_input(ee: MultiExitModel, call: Call) -> None:
    batches = inputs(CALLS)
    with torch.no_grad():
        alone = [call(ee, x) for x in batches]
    together = in_threads(call, ee, batches)
    assert sum(not all_equal(*pair) for pair in zip(alone, together, strict=True)) == 0
    assert not any(module._forward_hooks for module in ee.backbone.modules())


def test_a_call_inside_a_call(ee: MultiExitModel) -> None:
    """A user's own hook asks the model about another input, while the model runs."""
    x, other = images(3), images(4)
    with torch.no_grad():
        alone, alone_other = everything(ee, x), stopped(ee, other)
    asked: list[tuple[Tensor, ...]] = []
    inside = threading.local()

    def ask(module: nn.Module, args: Any, output: Any) -> None:
        if not getattr(inside, "on", False):
            inside.on = True
            asked.append(stopped(ee, other))
            inside.on = False

    ee.backbone.blocks[1].register_forward_hook(ask)
    for first, second in [(everything(ee, x), asked[-1]), *zip(in_threads(everything, ee, [x] * 50), asked[1:51])]:  # noqa: B905
        assert all_equal(first, alone)
        assert all_equal(second, alone_other)
    assert len(asked) == 51


@pytest.mark.parametrize("compiled", [False, True], ids=["trains", "trains compiled"])
def test_answers_while_another_thread_trains_exits_on_the_same_backbone(
    ee: MultiExitModel, loader: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: compile_(model, backend="eager"))
    other = exitkit.attach(ee.backbone, images(), every=2, method="sdn")
    batches = inputs(CALLS)
    with torch.no_grad():
        alone = [mixed(ee, x) for x in batches]
    fitted = copy.deepcopy(other)
    exitkit.Trainer(fitted, epochs=2, compile=compiled, show_progress=False).fit(loader(64))
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(exitkit.Trainer(other, epochs=2, compile=compiled, show_progress=False).fit, loader(64))
        together = in_threads(mixed, ee, batches)
        training.result()
    assert sum(not all_equal(*pair) for pair in zip(alone, together, strict=True)) == 0
    assert all_equal(list(fitted.classifiers.state_dict().values()), list(other.classifiers.state_dict().values()))


def while_others_answer(ee: MultiExitModel, work: Callable[[], Any]) -> list[bool]:
    """Run ``work`` in this thread; whether every answer of two other threads meanwhile was the one it is alone."""
    batches, done = inputs(4), threading.Event()
    with torch.no_grad():
        alone = [everything(ee, x) for x in batches]

    def answer() -> list[bool]:
        right: list[bool] = []
        with torch.no_grad():
            while not done.is_set():
                number = len(right) % len(batches)
                right.append(all_equal(everything(ee, batches[number]), alone[number]))
        return right

    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(answer) for _ in range(2)]
        try:
            work()
        finally:
            done.set()
        return [right for other in others for right in other.result()]


def test_four_threads_compile_one_model(ee: MultiExitModel) -> None:
    x = images(6)
    expected = exitkit.compile(ee, 0.5)(x)
    with ThreadPoolExecutor(4) as pool:
        engines = list(pool.map(lambda _: exitkit.compile(ee, 0.5), range(4)))
    assert all(all_equal(engine(x), expected) for engine in engines)


@pytest.mark.parametrize("work", ["compile", "attach", "inspect", "export", "onnx"])
def test_a_model_answers_while_another_thread_captures_its_backbone(
    ee: MultiExitModel, tmp_path: Path, work: str
) -> None:
    if work == "onnx":
        pytest.importorskip("onnxruntime")
    does: dict[str, Callable[[], Any]] = {
        "compile": lambda: [exitkit.compile(ee, 0.5) for _ in range(3)],
        "attach": lambda: exitkit.attach(ee.backbone, images(), every=2, head="tail"),
        "inspect": lambda: [exitkit.inspect(ee.backbone, images(), show=False) for _ in range(3)],
        "export": lambda: exitkit.export(ee, tmp_path / "model.pt2", 0.5),
        "onnx": lambda: exitkit.export(ee, tmp_path / "model.onnx", 0.5),
    }
    ee.eval()
    right = while_others_answer(ee, does[work])
    assert right
    assert all(right)


def test_a_capture_never_shows_its_evaluation_mode_to_other_threads(ee: MultiExitModel) -> None:
    """Trained behind a capture, the backbone stays in training mode: BatchNorm counts every batch."""
    ee.train()
    norm = ee.backbone.blocks[0].norm
    before, done, calls = int(norm.num_batches_tracked), threading.Event(), [0]

    def train() -> None:
        while not done.is_set():
            ee(images(4))
            calls[0] += 1

    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train)
        try:
            for _ in range(3):
                ee.partition()
        finally:
            done.set()
        training.result()
    assert calls[0]
    assert int(norm.num_batches_tracked) - before == calls[0]
    assert all(module.training for module in ee.backbone.modules())


def test_a_backbone_is_trained_while_another_thread_captures_it(
    ee: MultiExitModel, loader: Callable[..., Any]
) -> None:
    trainer = exitkit.Trainer(ee, regime="joint", epochs=2, show_progress=False)
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(trainer.fit, loader(64))
        while not training.done():
            exitkit.inspect(ee.backbone, images(), show=False)
        training.result()
    assert all(isinstance(parameter, nn.Parameter) for parameter in ee.backbone.parameters())


def test_a_capture_in_the_middle_of_a_call_and_of_another_capture(ee: MultiExitModel) -> None:
    """A user's own hook has a model with exits answer, or compiles one, while another runs or is captured."""
    outer = TinyNet().eval()
    inside = threading.local()
    seen: list[str] = []

    def ask(module: nn.Module, args: Any, output: Any) -> None:
        if not getattr(inside, "on", False) and not torch.compiler.is_exporting():
            inside.on = True
            exitkit.compile(ee, 0.5)(images(3))
            everything(ee, images(3))
            seen.append(threading.current_thread().name)
            inside.on = False

    outer.blocks[1].register_forward_hook(ask)
    with ThreadPoolExecutor(1, "asks") as pool:
        asks = pool.submit(lambda: everything(exitkit.attach(outer, images(), every=2), images(2)))
        asks.result()
    assert len(seen) >= 2  # in the capture's own forward, and in the call


def test_a_failed_capture_lets_others_go_on(ee: MultiExitModel) -> None:
    with pytest.raises(NotCapturableError):
        exitkit.attach(Branching(lambda: None), torch.randn(2, 4))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(everything, ee, images()).result()


class Branching(nn.Module):
    """A path that depends on values, which torch.export refuses with many words."""

    def __init__(self, during: Callable[[], None]) -> None:
        super().__init__()
        self.first, self.last, self.during = nn.Linear(4, 4), nn.Linear(4, 3), during

    def forward(self, x: Tensor) -> Tensor:
        self.during()
        x = self.first(x)
        return self.last(x + 1 if x.sum() > 0 else x)


def test_a_refused_capture_is_quiet_and_other_threads_are_heard(capfd: pytest.CaptureFixture[str]) -> None:
    def others() -> None:
        print("another thread's stderr", file=sys.stderr, flush=True)
        logging.getLogger("torch.export").error("another thread's torch")
        logging.getLogger("theirs").error("another thread's log")

    def during() -> None:
        logging.getLogger("theirs").error("this thread's log")
        logging.getLogger("torch.export").error("this thread's torch")
        with ThreadPoolExecutor(1) as pool:
            pool.submit(others).result()

    model = Branching(lambda: None)
    handler, loggers = logging.StreamHandler(), (logging.getLogger("theirs"), logging.getLogger("torch.export"))
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with pytest.raises(NotCapturableError, match=r"in forward\).*data-dependent"):
            exitkit.attach(model, torch.randn(2, 4))
        assert capfd.readouterr().err == ""
        model.during = lambda: during() if torch.compiler.is_exporting() else None
        with pytest.raises(NotCapturableError):
            exitkit.attach(model, torch.randn(2, 4))
        heard = capfd.readouterr().err
        loggers[1].error("afterwards")
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    for words in ("another thread's stderr", "another thread's torch", "another thread's log", "this thread's log"):
        assert words in heard
    assert "this thread's torch" not in heard
    assert "def forward" not in heard
    assert "afterwards" in capfd.readouterr().err


def test_an_onnx_export_is_quiet_and_other_threads_are_heard(
    ee: MultiExitModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    convert = torch.onnx.export

    def others() -> None:
        print("another thread's print", flush=True)
        logging.getLogger("theirs").error("another thread's log")
        logging.getLogger("onnxscript").error("another thread's exporter")
        warnings.warn("another thread's warning", UserWarning, stacklevel=1)

    def with_others(*args: Any, **kwargs: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(others).result()
        logging.getLogger("onnxscript").error("this thread's exporter")
        return convert(*args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", with_others)
    handler = logging.StreamHandler()
    for name in ("theirs", "onnxscript"):
        logging.getLogger(name).addHandler(handler)
    try:
        with pytest.warns(UserWarning, match="another thread's warning") as warned:
            exitkit.export(ee, tmp_path / "model.onnx", 0.5)
    finally:
        for name in ("theirs", "onnxscript"):
            logging.getLogger(name).removeHandler(handler)
    heard = capfd.readouterr()
    assert heard.out == "another thread's print\n"
    assert heard.err == "another thread's log\nanother thread's exporter\n"
    said = [
        str(one.message) for one in warned if "torchvision" not in str(one.message)
    ]  # whose note comes once a process
    assert said == ["another thread's warning"]
