"""Requests one by one through the stages' queues: the engine's answers, as soon as they are there, and nothing lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

import pytest
import torch

import exitkit
from exitkit import Prediction
from exitkit.engine.stage_queues import StageQueues
from exitkit.serving.scheduling import RequestScheduler, StageError, UnavailableError
from tests.stages import POISON, Stage, sample, staged_engine


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an ``async`` test; one that hangs fails."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 30))

    return run


async def entered(stage: Stage) -> None:
    assert await asyncio.to_thread(stage.entered.wait, 20)


def same(got: Prediction, expected: Prediction) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("max_wait_ms", [0.0, 20.0])
@in_a_loop
async def test_answers_are_the_engines(max_wait_ms: float) -> None:
    engine, _ = staged_engine()
    batches = [torch.rand(size, 3, generator=torch.Generator().manual_seed(size)) for size in (1, 1, 3, 1, 9, 2, 1)]
    scheduler = RequestScheduler(engine, batch_size=4, max_wait_ms=max_wait_ms)
    for batch, answer in zip(
        batches, await asyncio.gather(*(scheduler.answer(batch) for batch in batches)), strict=True
    ):
        same(answer, engine(batch))
    await scheduler.close()


@in_a_loop
async def test_who_leaves_early_is_answered_while_the_rest_of_the_batch_runs() -> None:
    engine, stages = staged_engine()
    stages[1].open.clear()
    scheduler = RequestScheduler(engine)
    hard, easy = (asyncio.create_task(scheduler.answer(sample(exit_))) for exit_ in (2, 0))
    assert (await easy).exit.tolist() == [0]
    await entered(stages[1])
    assert stages[0].sizes == [2]  # they began together
    assert not hard.done()
    stages[1].open.set()
    assert (await hard).exit.tolist() == [2]
    await scheduler.close()


@in_a_loop
async def test_stages_fill_up_with_samples_of_other_requests() -> None:
    engine, stages = staged_engine()
    scheduler = RequestScheduler(engine, batch_size=4, max_wait_ms=60_000)
    hard = [scheduler.answer(sample(2 if number % 2 else 0, number)) for number in range(8)]
    await asyncio.gather(*hard)
    assert [stage.sizes for stage in stages] == [[4, 4], [4], [4]]
    await scheduler.close()


@in_a_loop
async def test_nobody_is_held_back_longer_than_said() -> None:
    engine, _ = staged_engine()
    scheduler = RequestScheduler(engine, batch_size=64, max_wait_ms=150)
    began = asyncio.get_running_loop().time()
    await scheduler.answer(sample(2))
    assert 0.15 <= asyncio.get_running_loop().time() - began < 5
    await scheduler.close()


@in_a_loop
async def test_another_threshold_for_one_request_alone() -> None:
    engine, stages = staged_engine()
    scheduler = RequestScheduler(engine, max_wait_ms=50)
    x = torch.tensor([[0.4, 0.6, 0.0]])
    answers = await asyncio.gather(*(scheduler.answer(x, threshold) for threshold in (None, 0.3, 0.9, [0.9, 0.5])))
    assert [int(answer.exit) for answer in answers] == [1, 0, 2, 1]
    assert stages[0].sizes == [4]  # in one batch all the same
    scheduler.set_policy(0.3)
    assert int((await scheduler.answer(x)).exit) == 0
    with pytest.raises(exitkit.ArgumentError, match="threshold has 3 values"):
        await scheduler.answer(x, [0.1, 0.2, 0.3])
    await scheduler.close()


@in_a_loop
async def test_what_is_under_way_keeps_its_policy() -> None:
    engine, stages = staged_engine()
    stages[0].open.clear()
    scheduler = RequestScheduler(engine, max_wait_ms=0)
    before = asyncio.create_task(scheduler.answer(torch.tensor([[0.4, 0.4, 0.0]])))
    await entered(stages[0])
    scheduler.set_policy(0.3)
    stages[0].open.set()
    assert int((await before).exit) == 2
    await scheduler.close()


@in_a_loop
async def test_cancelled_requests_leave_the_queues() -> None:
    engine, stages = staged_engine()
    stages[0].open.clear()
    scheduler = RequestScheduler(engine, batch_size=1, max_wait_ms=0)
    under_way = asyncio.create_task(scheduler.answer(sample(2, 1.0)))
    await entered(stages[0])
    waiting = [asyncio.create_task(scheduler.answer(sample(2, number))) for number in (2.0, 3.0)]
    await asyncio.sleep(0)
    assert scheduler.queued == 3
    under_way.cancel()
    waiting[0].cancel()
    await asyncio.sleep(0)
    assert scheduler.queued == 1
    stages[0].open.set()
    assert int((await waiting[1]).exit) == 2
    assert stages[0].rows == [1.0, 3.0]
    assert stages[1].rows == [3.0]  # who was cancelled inside of stage 0 goes no further
    await scheduler.close()


@in_a_loop
async def test_too_many_are_refused_and_those_who_wait_are_not_hurt() -> None:
    engine, stages = staged_engine()
    stages[0].open.clear()
    scheduler = RequestScheduler(engine, max_queued=3)
    taken = [asyncio.create_task(scheduler.answer(sample(0))) for _ in range(3)]
    await entered(stages[0])
    with pytest.raises(UnavailableError, match="3 samples are under way, and at most 3 are taken"):
        await scheduler.answer(sample(0))
    stages[0].open.set()
    assert [int(one.exit) for one in await asyncio.gather(*taken)] == [0, 0, 0]
    assert int((await scheduler.answer(sample(1))).exit) == 1
    with pytest.raises(exitkit.ArgumentError, match=r"a request of 4 samples; .* at most 3 at once"):
        await scheduler.answer(torch.zeros(4, 3))
    with pytest.raises(exitkit.ArgumentError, match="a request of 0 samples"):
        await scheduler.answer(torch.zeros(0, 3))
    await scheduler.close()


@in_a_loop
async def test_closing_answers_all_that_was_taken_and_takes_no_more() -> None:
    engine, stages = staged_engine()
    scheduler = RequestScheduler(engine, batch_size=64, max_wait_ms=60_000)
    stages[0].open.clear()
    taken = [asyncio.create_task(scheduler.answer(sample(number % 3))) for number in range(6)]
    await asyncio.sleep(0)
    closing = asyncio.create_task(scheduler.close())
    await entered(stages[0])
    with pytest.raises(UnavailableError, match="shutting down"):
        await scheduler.answer(sample(0))
    stages[0].open.set()
    await closing
    assert [int((await one).exit) for one in taken] == [0, 1, 2, 0, 1, 2]
    await RequestScheduler(engine).close()  # one that was never used


@in_a_loop
async def test_a_request_that_makes_a_stage_fail_fails_alone() -> None:
    engine, _ = staged_engine()
    scheduler = RequestScheduler(engine, max_wait_ms=50)
    good, bad = (asyncio.create_task(scheduler.answer(one)) for one in (sample(2, 1.0), sample(2, POISON)))
    with pytest.raises(StageError, match="the model failed on this request: RuntimeError: poisoned"):
        await bad
    assert int((await good).exit) == 2
    assert scheduler.queued == 0
    await scheduler.close()


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"max_wait_ms": -1.0}, {"max_queued": 0}])
def test_arguments_out_of_range(arguments: dict[str, Any]) -> None:
    name, value = next(iter(arguments.items()))
    with pytest.raises(exitkit.ArgumentError, match=f"{name}={value!r} must be"):
        RequestScheduler(staged_engine()[0], **arguments)


def test_the_deepest_full_queue_comes_first() -> None:
    engine, _ = staged_engine()
    queues = StageQueues(engine.loop, 2)
    for stage, size in ((0, 5), (1, 2), (2, 1)):
        queues.put(stage, engine.loop.start([torch.zeros(size, 3)]))
    assert [queues.ready().stage, queues.ready(0.0).stage] == [1, 2]  # type: ignore[union-attr]
    place = queues.ready()
    assert place is not None
    queues.take(place)
    sizes = []
    while (place := queues.ready()) is not None:
        sizes.append([len(batch) for batch in queues.take(place)])
    assert sizes == [[2], [2]]
    assert [place.stage for place in queues.places() if queues.take(place)] == [0, 2]
    assert queues.oldest() is None
