"""``Engine.map`` where its iterable misbehaves: nothing that was accepted is lost, and nothing is waited for too long."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import exitkit
from tests.toy import TinyNet, images


@pytest.fixture(scope="module")
def engine() -> exitkit.Engine:
    torch.manual_seed(0)
    return exitkit.compile(exitkit.attach(TinyNet().eval(), images(), every=2, method="sdn"), 0.4)


def _dying(batches: int) -> Iterator[Tensor]:
    for index in range(batches):
        yield images(2) + index
    raise OSError("the disk is gone")


@pytest.mark.parametrize("max_wait", [float("inf"), 5.0])
def test_what_was_accepted_before_the_iterable_died_is_answered(engine: exitkit.Engine, max_wait: float) -> None:
    answers = engine.map(_dying(150), batch_size=512, max_wait=max_wait)
    got: list[exitkit.engine.Prediction] = []

    def take() -> None:
        for prediction in answers:
            got.append(prediction)

    with pytest.raises(OSError, match="the disk is gone"):
        take()
    assert len(got) == 150
    for index in (0, 77, 149):
        assert torch.equal(got[index].exit, engine(images(2) + index).exit)


def test_a_stalled_iterable_holds_back_no_answer(engine: exitkit.Engine) -> None:
    release = threading.Event()

    def stalled() -> Iterator[Tensor]:
        yield images(2)
        release.wait(20)
        yield images(2)

    answers = engine.map(stalled(), batch_size=64, max_wait=0.1)
    started = time.monotonic()
    next(answers)
    took = time.monotonic() - started
    release.set()
    assert len(list(answers)) == 1
    assert took < 5  # 0.1 s and a step; without the thread it is 20 s


def test_closing_stops_the_fetching(engine: exitkit.Engine) -> None:
    taken = []

    def endless() -> Iterator[Tensor]:
        while True:
            taken.append(len(taken))
            yield images(2)

    answers = engine.map(endless(), batch_size=2, max_wait=0.05)
    next(answers)
    answers.close()
    deadline = time.monotonic() + 20
    while any(thread.name == "exitkit-batches" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.name == "exitkit-batches" for thread in threading.enumerate())
    count = len(taken)
    assert count < 20  # a few ahead, not all that there are
    with pytest.raises(StopIteration):
        next(answers)


def test_closing_leaves_the_callers_generator_open(engine: exitkit.Engine) -> None:
    mine = (images(2) for _ in range(100))
    answers = engine.map(mine, batch_size=2)
    next(answers)
    answers.close()
    assert next(mine).shape == (2, 1, 8, 8)


def test_a_bad_batch_is_told_in_its_turn_with_a_thread_too(engine: exitkit.Engine) -> None:
    answers = engine.map([images(2), images(2, channels=3), images(2)], batch_size=4, max_wait=5.0)
    next(answers)
    with pytest.raises(exitkit.ExitkitError, match="batch 1 failed"):
        next(answers)


def test_arguments_are_checked_at_the_call(engine: exitkit.Engine) -> None:
    with pytest.raises(exitkit.ExitkitError, match="max_wait"):
        engine.map([images(2)], max_wait=-1)
