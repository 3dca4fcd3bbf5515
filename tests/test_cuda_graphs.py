"""Recorded steps as far as a CPU shows them: kernels in Triton's interpreter, recordings that are run again by hand."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import exitkit
from exitkit.engine import exported
from exitkit.engine.cpp_compiler import check_compiler
from exitkit.engine.cuda import reference, toolchain
from exitkit.engine.cuda.buckets import SIZES, bucket_of, buckets_up_to
from exitkit.engine.cuda.buffers import Memory, Results, Slot
from exitkit.engine.cuda.graphs import GraphLoop, Graphs
from exitkit.engine.cuda.recorder import Run, UnrecordableError
from exitkit.engine.stage_queues import StageQueues
from exitkit.serving.scheduling import RequestScheduler
from tests.toy import TinyNet, images, noisy


@given(largest=st.integers(1, 300), data=st.data())
def test_a_bucket_holds_its_batch(largest: int, data: st.DataObject) -> None:
    sizes = buckets_up_to(largest)
    batch = data.draw(st.integers(1, largest))
    size = bucket_of(sizes, batch)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == largest
    assert batch <= size
    assert all(other < batch for other in sizes if other < size)
    assert len(sizes) <= len(SIZES) + 1


class Recorder:
    """Runs a function again when it is replayed, and counts recordings; fails ``failures`` times, as small memory does."""

    def __init__(self) -> None:
        self.recorded = 0
        self.failures = 0
        self.error: Exception = torch.OutOfMemoryError("made up")

    def __call__(self, run: Run) -> Run:
        if self.failures:
            self.failures -= 1
            raise self.error
        self.recorded += 1
        return run


def recorded(
    engine: exitkit.Engine, largest: int = 32, waits: tuple[bool, ...] = ()
) -> tuple[exitkit.Engine, Recorder]:
    recorder, exits = Recorder(), len(engine.thresholds)
    graphs = Graphs(largest, exits, torch.device("cpu"), reference, recorder)
    return replace(engine, loop=GraphLoop(engine.loop.program, engine.policy, graphs=graphs, waits=waits)), recorder


def agree(got: exitkit.Prediction, expected: exitkit.Prediction) -> None:
    assert got.exit.tolist() == expected.exit.tolist()
    assert got.non_finite.tolist() == expected.non_finite.tolist()
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.score, expected.score, rtol=1e-5, atol=1e-5)


def compiled(method: str) -> exitkit.Engine:
    torch.manual_seed(0)
    ee = noisy(exitkit.attach(TinyNet().eval(), images(), head="conv", method=method))
    taus = exitkit.collect(ee, [images(64)]).scores()[:, :-1].quantile(0.6, dim=0).tolist()
    return exitkit.compile(ee, taus)


@pytest.mark.parametrize("waits", [(), (False, False, False), (True, False, True)])
@pytest.mark.parametrize("method", ["sdn", "ztw", "pbee", "gpf"])
def test_recorded_steps_answer_as_the_loop_does(method: str, waits: tuple[bool, ...]) -> None:
    engine = compiled(method)
    fast, _ = recorded(engine, waits=waits)
    x = images(64)
    assert len(set(engine(x).exit.tolist())) > 2
    for size in (1, 3, 11, 32, 64, 11, 1, 0, 5):  # 64 is above the largest bucket
        agree(fast(x[:size]), engine(x[:size]))


def test_samples_of_several_rows_and_texts_of_several_lengths() -> None:
    transformers = pytest.importorskip("transformers")
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    tnt = timm.create_model("tnt_s_patch16_224", num_classes=4, img_size=32, depth=3).eval()
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16
    )
    bert = transformers.BertForSequenceClassification(config).eval()

    def text(samples: int, length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(1, 90, (samples, length))
        mask = torch.ones_like(ids)
        mask[: samples // 2, length // 2 :] = 0
        return {"input_ids": ids, "attention_mask": mask}

    cases: list[tuple[Any, list[Any]]] = [
        (tnt, [torch.randn(n, 3, 32, 32) for n in (7, 2, 1)]),
        (bert, [text(5, 12), text(3, 9), text(1, 12)]),
    ]
    for model, batches in cases:
        ee = noisy(exitkit.attach(model, batches[0], every=1, head="1L", method="sdn"))
        taus = exitkit.collect(ee, batches[:1]).scores()[:, :-1].quantile(0.5, dim=0).tolist()
        engine = exitkit.compile(ee, taus)
        fast, _ = recorded(engine)
        for batch in batches * 2:
            call = batch if isinstance(batch, dict) else {"": batch}
            got, expected = (e(**call) if "" not in call else e(batch) for e in (fast, engine))
            agree(got, expected)


def test_answers_outlive_the_next_call_and_another_threshold_records_nothing() -> None:
    fast, recorder = recorded(compiled("ztw"))
    first = fast(images(8))
    kept = [part.clone() for part in first]
    fast(images(8) * 5)
    before = recorder.recorded
    assert all(torch.equal(now, then) for now, then in zip(first, kept, strict=True))
    everybody = fast.at(-1.0)(images(8))
    assert everybody.exit.tolist() == [0] * 8
    assert recorder.recorded == before


def test_answers_can_be_saved() -> None:
    """Neither torch nor safetensors save tensors of several dtypes that share memory."""
    fast, _ = recorded(compiled("sdn"))
    answers = fast(images(8))._asdict()
    saved = io.BytesIO()
    torch.save(answers, saved)
    saved.seek(0)
    for again in (torch.load(saved, weights_only=True), safetensors.torch.load(safetensors.torch.save(answers))):
        assert all(torch.equal(again[name], column) for name, column in answers.items())


def test_one_recording_for_a_step_and_a_bucket() -> None:
    engine = compiled("sdn").at(float("inf"))
    fast, recorder = recorded(engine, largest=64)
    for size in (9, 10, 11, 12, 16, 9, 33, 48, 64):
        fast(images(size))
    assert recorder.recorded == 3 * len(engine.loop.program.steps)  # buckets of 16, 48 and 64
    fast.warm(images(2), [1, 64])
    assert recorder.recorded == 4 * len(engine.loop.program.steps)


def messages(run: Callable[[], Any], about: str) -> int:
    """How many warnings with these words a function gives."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    return sum(about in str(warning.message) for warning in found)


@pytest.mark.parametrize(("failures", "largest"), [(1, 16), (2, 8), (4, 2)])
def test_memory_that_does_not_suffice_halves_the_batch_with_one_warning(failures: int, largest: int) -> None:
    """Out of memory, once and again: fewer samples at a time, said once, and the engine goes on."""
    engine = compiled("sdn")
    fast, recorder = recorded(engine)
    recorder.failures = failures

    def serve() -> None:
        agree(fast(images(32)), engine(images(32)))
        agree(fast(images(30)), engine(images(30)))

    assert messages(serve, "out of GPU memory") == 1
    assert messages(serve, "memory") == 0
    assert fast.loop.largest == largest
    assert len(list(fast.map([images(32)] * 2, batch_size=64))) == 2


def test_memory_that_does_not_suffice_for_one_sample_is_an_error_and_the_engine_usable() -> None:
    engine = compiled("sdn")
    fast, recorder = recorded(engine)
    recorder.failures = 1
    with pytest.raises(torch.OutOfMemoryError):
        fast(images(1))
    agree(fast(images(32)), engine(images(32)))


def test_memory_that_does_not_suffice_for_the_buffers_halves_the_batch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = compiled("sdn")
    fast, _ = recorded(engine)
    whole = Results.empty

    def empty(classes: int, dtype: torch.dtype, largest: int, device: torch.device) -> Results:
        if largest > 8:
            raise torch.OutOfMemoryError("made up")
        return whole(classes, dtype, largest, device)

    monkeypatch.setattr(Results, "empty", empty)
    assert messages(lambda: agree(fast(images(32)), engine(images(32))), "out of GPU memory") == 1
    assert fast.loop.largest == 8


def test_a_step_that_cannot_be_recorded_runs_by_itself_and_that_is_said_once() -> None:
    engine = compiled("ztw")
    fast, recorder = recorded(engine)
    recorder.failures, recorder.error = 99, UnrecordableError("it waits for the device")

    def serve() -> None:
        for size in (8, 9, 8, 8, 9):
            agree(fast(images(size)), engine(images(size)))

    assert messages(serve, "it waits for the device") == 1
    assert recorder.recorded == 0
    assert recorder.failures == 99 - 3  # calls that tried


def test_a_size_that_was_refused_stays_so_once_memory_ran_out() -> None:
    engine = compiled("ztw")
    fast, recorder = recorded(engine)
    recorder.failures, recorder.error = 99, UnrecordableError("it waits for the device")

    def serve() -> None:
        for _ in range(4):
            agree(fast(images(8)), engine(images(8)))

    assert messages(serve, "CUDA graphs") == 1
    with pytest.warns(UserWarning, match="out of GPU memory"):
        fast.loop.graphs.shrink(32)  # type: ignore[attr-defined]
    assert messages(serve, "CUDA graphs") == 0
    assert recorder.failures == 99 - 3


def test_a_recording_that_another_thread_broke_is_made_by_a_later_call() -> None:
    engine = compiled("ztw")
    fast, recorder = recorded(engine.at(2.0))
    recorder.failures, recorder.error = 2, UnrecordableError("another thread waited for the device")

    def serve() -> None:
        for _ in range(4):
            agree(fast(images(8)), engine.at(2.0)(images(8)))

    assert messages(serve, "CUDA graphs") == 0
    assert recorder.recorded == len(engine.loop.program.steps)


@pytest.mark.parametrize(
    ("error", "calls"), [(UnrecordableError("made up"), 3), (torch.OutOfMemoryError("made up"), 1)]
)
def test_a_warning_is_of_the_callers_line(error: Exception, calls: int) -> None:
    fast, recorder = recorded(compiled("sdn"))
    recorder.failures, recorder.error = calls, error
    for _ in range(calls - 1):
        fast(images(8))
    with pytest.warns(UserWarning, match="CUDA graphs|out of GPU memory") as told:
        fast(images(8))
    assert [warning.filename for warning in told] == [__file__]


def test_a_ninth_size_runs_step_by_step_and_that_is_said_once() -> None:
    engine = compiled("sdn")
    fast, recorder = recorded(engine)

    @torch.inference_mode()
    def serve(widths: range) -> None:
        for width in widths:
            x = images(4, width=width)
            agree(fast.loop.answer((x,)), engine.loop.answer((x,)))

    assert messages(lambda: serve(range(8, 16)), "sizes") == 0
    before = recorder.recorded
    assert messages(lambda: serve(range(16, 19)), "inputs of more than 8 sizes") == 1
    assert recorder.recorded == before


class Reader(nn.Module):
    """Looks tokens up in the first stage, beside a wide feature that later stages overwrite where they can."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4))
        self.linear = nn.Linear(16, 3)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        feature = x + self.table(ids)
        for block in self.blocks:
            feature = block(feature)
        return cast("Tensor", self.linear(feature.mean(1)))


def test_places_behind_the_last_sample_hold_integers_that_the_model_knows() -> None:
    """A table is never asked for what a float left in a place that is padded: on a GPU that would end the process."""
    torch.manual_seed(0)

    def batch(samples: int) -> tuple[Tensor, Tensor]:
        return torch.randint(0, 7, (samples, 8)), 1e3 * torch.randn(samples, 8, 16)

    ee = noisy(exitkit.attach(Reader().eval(), batch(3), at=["blocks.0", "blocks.1", "blocks.2"], method="sdn"))
    engine = exitkit.compile(ee, 0.6)
    fast, _ = recorded(engine)
    for size in (16, 11, 3, 16, 7, 13):
        example = batch(size)
        agree(fast(*example), engine(*example))
    memory = Memory(4, torch.device("cpu"))
    first = memory.slots(0, {"x": (torch.ones(1, 9), 1), "ids": (torch.ones(1, 9, dtype=torch.int64), 1)})
    for slot in memory.slots(
        2, {"y": (torch.ones(1, 5), 1), "mask": (torch.ones(1, 9, dtype=torch.bool), 1)}
    ).values():
        slot.flat.fill_(1)
    assert first["ids"].flat.eq(0).all()


class InPlace(TinyNet):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            x += 1  # changes what the boundary before handed on
        return cast("Tensor", self.linear(x.mean((2, 3))))


def test_steps_that_write_into_what_they_are_given() -> None:
    torch.manual_seed(0)
    ee = noisy(exitkit.attach(InPlace().eval(), images(), every=1, method="sdn"))
    engine = exitkit.compile(ee, exitkit.collect(ee, [images(64)]).scores()[:, :-1].quantile(0.5, 0).tolist())
    fast, _ = recorded(engine)
    for size in (9, 12, 9, 1):
        agree(fast(images(size)), engine(images(size)))


def test_a_value_in_another_memory_format_lands_in_that_of_its_memory() -> None:
    """Maps are handed on as the next step takes them, and transposed only where a step gave them in another order."""
    like = torch.zeros(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    slot = Memory(6, torch.device("cpu")).slots(0, {"x": (like, 2)})["x"]
    assert slot.like.device.type == "meta"  # no batch is kept for its sizes
    assert slot.view(6).is_contiguous(memory_format=torch.channels_last)
    for made in (torch.randn(4, 5, 3, 4), torch.randn(4, 5, 3, 4).contiguous(memory_format=torch.channels_last)):
        slot.flat[: made.numel()] = slot.flattened(made)
        assert torch.equal(slot.view(4), made)
    kept = torch.randn(4, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    assert slot.flattened(kept).data_ptr() == kept.data_ptr()


class ChannelsLast:
    """A step that takes images channels last, as compiled ones do, and notes how they come."""

    channels_last = (True,)

    def __init__(self, run: Run) -> None:
        self.run = cast("Callable[..., Any]", run)
        self.came: set[bool] = set()

    def __call__(self, x: Tensor) -> Any:
        self.came.add(x.is_contiguous(memory_format=torch.channels_last))
        return self.run(x)


def test_the_first_step_is_given_its_input_in_its_own_memory_format() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)).eval()
    engine = exitkit.compile(exitkit.attach(net, images(2, 3), at=["0"], method="sdn"), 2.0)
    program = engine.loop.program
    first = ChannelsLast(program.steps[0].run)
    steps = replace(program.steps[0], run=first), *program.steps[1:]
    fast, _ = recorded(replace(engine, loop=replace(engine.loop, program=replace(program, steps=steps))))
    for size in (5, 1):
        agree(fast(images(size, 3)), engine(images(size, 3)))
    assert first.came == {True}


def test_a_damaged_step_is_an_error() -> None:
    """The kernels trust sizes; a step that made up samples is refused before."""
    engine = compiled("sdn")
    steps = engine.loop.program.steps
    broken = replace(steps[1], run=lambda *values: [torch.cat([one, one]) for one in steps[1].run(*values)])
    program = replace(engine.loop.program, steps=(steps[0], broken, *steps[2:]))
    fast, _ = recorded(replace(engine.at(2.0), loop=replace(engine.at(2.0).loop, program=program)))
    with pytest.raises(exitkit.ExitkitError, match="export it again"):
        fast(images(5))


def test_a_compiled_step_runs_on_no_more_samples_than_it_was_compiled_for() -> None:
    """Indices of 32 bits reach for so many: larger batches are answered in parts, and in `map` no stage is fuller."""
    engine = compiled("sdn")
    fast, _ = recorded(engine, largest=16)
    sizes: list[int] = []
    for step in engine.loop.program.steps:
        step.run.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))  # type: ignore[attr-defined]
    agree(fast(images(60)), fast(images(60)))
    assert len(list(fast.map([images(30)] * 5, batch_size=64))) == 5
    assert max(sizes) == 16


@pytest.fixture
def watched() -> tuple[exitkit.Engine, exitkit.Engine, list[int]]:
    """An engine, the same with recordings for up to 16 samples, and how many samples its first step ran on."""
    engine = compiled("sdn")
    sizes: list[int] = []
    first = engine.loop.program.steps[0]

    def run(*values: Any) -> Any:
        sizes.append(len(values[0]))
        return first.run(*values)

    program = replace(engine.loop.program, steps=(replace(first, run=run), *engine.loop.program.steps[1:]))
    return engine, recorded(replace(engine, loop=replace(engine.loop, program=program)), largest=16)[0], sizes


def test_map_gathers_whole_batches_for_the_recordings(
    watched: tuple[exitkit.Engine, exitkit.Engine, list[int]],
) -> None:
    engine, fast, sizes = watched
    fast.warm(images(1))
    sizes.clear()
    batches = [images(count) for count in (5, 5, 5, 5, 0, 9, 1)]
    for got, batch in zip(fast.map(batches, batch_size=16), batches, strict=True):
        agree(got, engine(batch))
    assert sizes == [16, 16]  # 16 of the 30 samples, then 14, which are padded


def test_requests_with_thresholds_of_their_own_are_answered_by_recordings_where_they_agree(
    watched: tuple[exitkit.Engine, exitkit.Engine, list[int]],
) -> None:
    engine, fast, sizes = watched
    exits, last = len(engine.thresholds), (2.0,) * len(engine.thresholds)

    def answered(*taus: tuple[float, ...]) -> list[list[int]]:
        queues = StageQueues(fast.loop, 16)
        for place, own in enumerate(taus):
            batch = fast.loop.start((images(5),), 5 * place)
            batch.thresholds = np.tile(np.array(own), (5, 1))
            queues.put(0, batch)
        place = queues.ready(patience=0.0)
        assert place is not None
        sizes.clear()
        ran = queues.run(0, queues.take(place))
        assert not ran.onward
        assert not ran.failed
        found = {
            row: exit_ for one in ran.answers for row, exit_ in zip(one.rows.tolist(), one.exit.tolist(), strict=True)
        }
        return [[found[row] for row in range(5 * place, 5 * place + 5)] for place in range(len(taus))]

    fast.warm(images(1))
    expected = engine(images(5)).exit.tolist()
    assert answered(engine.thresholds, engine.thresholds) == [expected, expected]
    assert answered(last, last) == [[exits] * 5] * 2
    assert sizes == [16]  # ten samples at once, padded
    assert answered(engine.thresholds, last) == [expected, [exits] * 5]
    assert sizes == [10]
    agree(fast(images(5)), engine(images(5)))


def test_a_server_answers_by_recordings_after_one_wait_and_by_each_requests_policy() -> None:
    engine = compiled("sdn")
    fast, recorder = recorded(engine, largest=16)
    x = images(11)
    policies = [engine.policy, *(engine.at(tau).policy for tau in (float("inf"), float("-inf"), 0.5))]

    async def serve() -> list[exitkit.Prediction]:
        scheduler = RequestScheduler(fast, batch_size=16, max_wait_ms=150.0)
        cancelled = asyncio.create_task(scheduler.answer(x))
        await asyncio.sleep(0)
        cancelled.cancel()
        found = await asyncio.gather(
            *(scheduler.answer(x[place : place + 1], policies[place % 4]) for place in range(8))
        )
        found += [await scheduler.answer(x, policy) for policy in policies]
        await scheduler.close()
        return list(found)

    began = time.monotonic()
    answers = asyncio.run(serve())
    assert time.monotonic() - began >= 0.15 * len(policies)  # the last ones fill no batch: each waits once, all of it
    for place, got in enumerate(answers[:8]):
        agree(got, engine.at(policies[place % 4])(x[place : place + 1]))
    for got, policy in zip(answers[8:], policies, strict=True):
        agree(got, engine.at(policy)(x))
        assert [column.dtype for column in got[1:]] == [torch.int64, torch.float64, torch.bool]
    assert recorder.recorded
    agree(fast(x), engine(x))


def test_an_interrupted_call_leaves_nothing_of_its_size_or_threshold_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a notebook: the next call, as the one before, would have been answered with what the interrupted one wrote."""

    class Interrupted:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def copy_(self, *args: Any, **kwargs: Any) -> None:
            self.tensor.copy_(*args, **kwargs)
            raise KeyboardInterrupt

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    engine = compiled("sdn")
    fast, _ = recorded(engine)
    first, x = images(9)[:8], images(8)
    agree(fast(first), engine(first))
    monkeypatch.setattr(Slot, "view", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fast(images(3))
    monkeypatch.undo()
    agree(fast(x), engine(x))
    graphs = cast("GraphLoop", fast.loop).graphs
    assert graphs is not None
    monkeypatch.setattr(graphs, "thresholds", Interrupted(graphs.thresholds))
    with pytest.raises(KeyboardInterrupt):
        fast.at(float("inf"))(x)
    monkeypatch.undo()
    agree(fast(x), engine(x))


def test_what_is_compiled_for_a_gpu_says_how_many_samples_come(tiny_ee: exitkit.MultiExitModel) -> None:
    """Inductor then knows whether 32 bits count the elements of the largest batch."""
    program = compiled("ztw").loop.program
    step, example = program.steps[0], images(3)
    bounds = exported._export(program, step, (example,), exported.MOST_SAMPLES).range_constraints.values()
    assert [int(bound.upper) for bound in bounds] == [256]
    free = exported._export(program, step, (example,), None).range_constraints.values()
    assert all(bound.upper > 10**9 for bound in free)


def test_a_sample_that_is_faulty_on_the_way_is_marked() -> None:
    engine = compiled("sdn").at(float("inf"))
    fast, _ = recorded(engine)
    x = images(5)
    x[2] = float("nan")
    assert fast(x).non_finite.tolist() == [False, False, True, False, False]


def test_threads_take_turns() -> None:
    engine = compiled("ztw")
    fast, _ = recorded(engine)
    batches = [images(n) for n in (1, 4, 9, 17, 31)]
    expected = [engine(x) for x in batches]
    errors: list[BaseException] = []

    def serve() -> None:
        try:
            for _ in range(10):
                for x, answer in zip(batches, expected, strict=True):
                    agree(fast(x), answer)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_memory_is_that_of_the_two_largest_boundaries_that_follow_each_other() -> None:
    memory = Memory(largest=4, device=torch.device("cpu"))
    sizes = [100, 50, 20, 10]  # floats of one sample at each boundary
    for boundary, size in enumerate(sizes):
        memory.slots(boundary, {"x": (torch.zeros(2, size), 2)})
    held = sum(len(part) for part in memory.parts if part is not None)
    assert held <= 4 * 4 * (100 + 50) + 2 * 512


def test_only_engines_that_record_can_be_warmed() -> None:
    with pytest.raises(exitkit.ArgumentError, match="on a GPU"):
        compiled("sdn").warm(images(2))


_CASES = """
import torch
from exitkit.engine.cuda import kernels, reference
from exitkit.engine.cuda.buffers import Boundary, Results
LARGEST = 80
for seed in range(40):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))
    bucket, classes = draw(1, 70), draw(1, 1500)
    samples = draw(0, bucket + 1)
    score = torch.rand(bucket, generator=generator, dtype=torch.float64)
    score[torch.rand(bucket, generator=generator) < 0.1] = float("nan")
    score[torch.rand(bucket, generator=generator) < 0.05] = float("inf")
    tie = seed % 3 == 0 and not score[0].isnan()
    tau = score[:1].clone() if tie else 1.2 * torch.rand(1, generator=generator, dtype=torch.float64) - 0.1
    tau = {9: torch.full_like(tau, float("inf")), 8: torch.full_like(tau, float("-inf"))}.get(seed % 10, tau)
    answer = torch.randn(bucket, classes, generator=generator).to([torch.float16, torch.float32][seed % 2])
    value = torch.randn(bucket, 3, 5, generator=generator)
    value = value.to([torch.float32, torch.bfloat16, torch.float64, torch.bool][seed % 4])
    found = []
    for module in (kernels, reference):
        here, there = Boundary.empty(LARGEST, score.device), Boundary.empty(LARGEST, score.device)
        here.rows.copy_(torch.randperm(LARGEST, generator=torch.Generator().manual_seed(seed)))
        here.faulty[::7] = 1
        here.count.fill_(samples)
        there.rows.fill_(-5)
        results = Results.empty(classes, torch.float32, LARGEST, score.device)
        module.decide(score, answer, tau, 3, here, there, results, seed % 7 == 6)
        target = torch.zeros(LARGEST * 15, dtype=value.dtype)
        module.compact(value.flatten(), target, bucket, there)
        columns = (there.count, there.rows, there.faulty, there.keep, target, *results)
        found.append([column.double().nan_to_num(9, 8, 7) for column in columns])
    for place, (one, other) in enumerate(zip(*found, strict=True)):
        assert torch.equal(one, other), (seed, place, one, other)
print("alike")
"""


def test_the_kernels_do_what_plain_torch_does() -> None:
    """In a process of its own: Triton reads the switch to its interpreter when it is imported."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", _CASES], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "alike", done.stderr


_COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from exitkit.engine.cuda import kernels
pointers = {"*fp64": "score threshold score_out", "*fp32": "answer logits_out", "*i64": "rows next_rows exit_out"}
pointers |= {"*i8": "faulty next_faulty faulty_out", "*i32": "count next_count keep source target"}
types = {name: kind for kind, names in pointers.items() for name in names.split()}
types |= dict.fromkeys(("classes", "exit_", "last", "width"), "i32")
for kernel in (kernels._decide_kernel, kernels._compact_kernel):
    names = kernel.arg_names
    constants = {(place,): 256 for place, name in enumerate(names) if name not in types}
    signature = {name: types.get(name, "constexpr") for name in names}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
print("compiled")
"""


def test_the_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", _COMPILED], capture_output=True, text=True)
    assert done.stdout.strip() == "compiled", done.stderr


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimize", [False, True])
def test_on_cuda_the_engine_answers_as_on_cpu(optimize: bool) -> None:
    torch.manual_seed(0)
    ee = noisy(exitkit.attach(TinyNet().eval(), images(), head="conv", method="ztw"))
    x = images(64)
    thresholds = exitkit.collect(ee, [x]).scores()[:, :-1].quantile(0.6, dim=0).tolist()
    expected = exitkit.compile(ee, thresholds)(x)
    got = exitkit.compile(ee.cuda(), thresholds, optimize=optimize)(x.cuda())
    same = got.exit.cpu() == expected.exit
    assert same.float().mean() > 0.95  # rounding decides near a threshold
    torch.testing.assert_close(got.logits.cpu()[same], expected.logits[same], rtol=1e-2, atol=1e-2)


# what AOTInductor is given to build with -----------------------------------------------------------------------------


@pytest.fixture
def toolkits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The folders that are looked through for CUDA, of which there are none but the test's."""
    found: list[Path] = []
    monkeypatch.setattr(toolchain, "_toolkits", lambda: iter(found))
    monkeypatch.setattr(toolchain.cpp_extension, "CUDA_HOME", "/a/wrapper/without/headers")
    monkeypatch.setenv("LIBRARY_PATH", "/elsewhere")
    toolchain.prepare.cache_clear()
    yield found
    toolchain.prepare.cache_clear()


def test_without_headers_of_cuda_there_is_one_clear_error(toolkits: list[Path], tmp_path: Path) -> None:
    """`which nvcc` may be a wrapper in a folder without headers: that is none."""
    toolkits.append(tmp_path)
    with pytest.raises(exitkit.ExitkitError, match="headers of CUDA"):
        toolchain.prepare()


def test_headers_and_a_libcuda_to_link_with_are_found(toolkits: list[Path], tmp_path: Path) -> None:
    for name in ("include/cuda.h", "lib64/stubs/libcuda.so"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    toolkits += [tmp_path / "nothing", tmp_path]
    toolchain.prepare()
    assert str(tmp_path) == toolchain.cpp_extension.CUDA_HOME
    assert os.environ["LIBRARY_PATH"].split(os.pathsep) == [str(tmp_path / "lib64/stubs"), "/elsewhere"]


def test_a_driver_without_a_libcuda_to_link_with_gets_one(
    toolkits: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "include").mkdir()
    (tmp_path / "include/cuda.h").touch()
    (tmp_path / "libcuda.so.1").touch()
    toolkits.append(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setattr(toolchain.ctypes.util, "find_library", lambda name: f"lib{name}.so.1")
    toolchain.prepare()
    folder = Path(os.environ["LIBRARY_PATH"].split(os.pathsep)[0])
    assert (folder / "libcuda.so").resolve() == tmp_path / "libcuda.so.1"


@pytest.fixture
def compiler(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Has Inductor build by g++ with an option of its own."""
    from torch._inductor import config

    def use(option: str) -> None:
        wrapper = tmp_path / "g++"
        wrapper.write_text(f'#!/bin/sh\nexec g++ "$@" {option}\n')
        wrapper.chmod(0o755)
        config.cpp.cxx = (None, str(wrapper))

    check_compiler.cache_clear()
    with config.patch({"cpp.cxx": config.cpp.cxx}):  # puts it back
        yield use
    check_compiler.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' compilers have no such option")
def test_a_compiler_that_copies_the_cpp_library_is_refused_before_it_ends_the_process(
    compiler: Callable[[str], None], tmp_path: Path
) -> None:
    compiler("-static-libstdc++")
    with pytest.raises(exitkit.ExitkitError, match=f"builds with '{tmp_path}/g.*CXX"):
        exitkit.compile(exitkit.attach(TinyNet().eval(), images()), 0.5, optimize=True)
    check_compiler.cache_clear()
    compiler("-O1")
    check_compiler()
