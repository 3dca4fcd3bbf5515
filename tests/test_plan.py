"""Plans: times decide where samples leave the batch, and never which exits exist, unless exits may be left out."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import exitkit
from exitkit import ExitkitError, ExitOutputs
from exitkit.engine.lowering import program_of
from exitkit.engine.plan import Measurement, Plan, Timings
from exitkit.engine.profiling import measure
from exitkit.engine.program import Program, Run
from exitkit.evaluation import ShiftMonitor
from tests.toy import TinyNet, images, noisy

TIMINGS = Timings(
    sizes=(1, 10, 20),
    seconds=((1.0, 1.0, 1.0), (2.0, 2.0, 4.0), (1.0, 10.0, 20.0)),
    heads=((0.5, 0.5, 0.5), (0.1, 1.0, 2.0), (0.0, 0.0, 0.0)),
    gathers=((0.1, 0.1, 0.1),) * 3,
    decisions=(0.2, 0.3),
)
PLAN = Plan(TIMINGS, reached=(1.0, 0.9, 0.4))


@pytest.fixture(scope="module")
def ee() -> exitkit.MultiExitModel:
    torch.manual_seed(0)
    return noisy(exitkit.attach(TinyNet().eval(), images(), head="conv", method="sdn"))


@pytest.fixture(scope="module")
def outputs(ee: exitkit.MultiExitModel) -> ExitOutputs:
    return exitkit.collect(ee, [images(600)]).against_backbone()


@pytest.fixture(scope="module")
def taus(outputs: ExitOutputs) -> list[float]:
    """Per exit, what six tenths of all samples do not pass: every exit is taken."""
    found = outputs.scores()[:, :-1].quantile(0.6, dim=0).tolist()
    assert (outputs.exit_rates(found) > 0.05).all()
    return found


@contextmanager
def steps_that_run(program: Program) -> Iterator[list[int]]:
    """The numbers of the program's steps, and of no others, as they are run."""
    ran: list[int] = []
    handles = [
        step.run.register_forward_hook(lambda *_, number=step.exit: ran.append(number))  # type: ignore[attr-defined]
        for step in program.steps
    ]
    yield ran
    for handle in handles:
        handle.remove()


# compaction ----------------------------------------------------------------------------------------------------------


def test_compaction_pays_where_the_next_step_gets_faster_by_more_than_it_takes() -> None:
    assert not TIMINGS.compacts(1, 10, 5)  # as slow at 5 as at 10
    assert TIMINGS.compacts(1, 20, 10)  # 2 instead of 4
    assert TIMINGS.compacts(2, 10, 9)  # 9 instead of 10
    assert not replace(TIMINGS, gathers=((9.0, 9.0, 9.0),) * 3).compacts(2, 10, 9)
    assert TIMINGS.compacts(2, 40, 20)  # beyond what was measured, in proportion: 20 instead of 40


def test_an_exit_gains_what_the_leavers_would_have_cost() -> None:
    # A tenth of 20 leaves at exit 0: of the 4 + 20 seconds behind it 2.4 are saved; head and decision take 0.7.
    assert PLAN.gain(0, 20) == pytest.approx(2.4 - 0.5 - 0.2)
    # Of the 18 that come to exit 1, 10 leave: 18 seconds behind it, and head and decision take 2.1.
    assert PLAN.gain(1, 20) == pytest.approx(18 * 5 / 9 - 1.8 - 0.3)


def test_all_exits_together_gain_what_each_of_those_kept_does() -> None:
    assert PLAN.total_gain(20) == pytest.approx(1.7 + 7.9)
    assert replace(PLAN, skipped=(1,)).total_gain(20) == pytest.approx(1.7)


@pytest.mark.parametrize(("head", "threshold", "said"), [(2.0, 0.5, True), (0.2, 0.5, False), (2.0, math.inf, False)])
def test_exits_that_cost_more_time_than_they_save_are_said_plainly(
    ee: exitkit.MultiExitModel, monkeypatch: pytest.MonkeyPatch, head: float, threshold: float, said: bool
) -> None:
    """Half of the samples leave at exit 0, and save 3 of 4 seconds; every exit takes as much as its head."""
    heads = ((head, head),) * 3 + ((0.0, 0.0),)
    timings = Timings((1, 8), ((1.0, 1.0),) * 4, heads, ((0.0, 0.0),) * 4, (0.0,) * 3)
    measured = Measurement(timings, np.array([[1.0] * 3, [0.0] * 3] * 4))
    monkeypatch.setattr("exitkit.engine.compiling.measure", lambda *_: measured)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exitkit.compile(ee, threshold, samples=images(8))
    words = [str(one.message) for one in caught if "more than they save" in str(one.message)]
    assert bool(words) == said
    assert all(caught[0].filename == __file__ and "4500.00 ms" in word for word in words)


def test_the_host_waits_where_the_next_step_gets_faster_by_more_than_the_wait() -> None:
    # Of 20 samples 18 come to exit 1: its step takes 3.6 instead of 4 s. Then 8: the last takes 8 instead of 18 s.
    assert PLAN.waits() == (True, True)
    assert replace(PLAN, timings=replace(TIMINGS, decisions=(0.41, 9.9))).waits() == (False, True)
    assert replace(PLAN, timings=replace(TIMINGS, decisions=(0.39, 10.1))).waits() == (True, False)
    assert replace(PLAN, reached=(1.0, 1.0, 1.0)).waits() == (False, False)  # no sample leaves
    assert replace(PLAN, timings=replace(TIMINGS, seconds=((1.0,) * 3,) * 3)).waits() == (False, False)


def test_a_heads_time_is_that_of_its_step_less_that_of_its_stage(ee: exitkit.MultiExitModel) -> None:
    """Both are run in the same way, recorded or not; an exit that is in no step of its own is timed eagerly, which is said."""

    def slow(run: Run, seconds: float) -> Run:
        def slowed(*values: Any) -> Sequence[Any]:
            time.sleep(seconds)
            return run(*values)

        return slowed

    loop = exitkit.compile(ee, 2.0, samples=images(4), skip_unprofitable=True).loop
    eager = program_of(ee, loop.policy, removable=True)
    steps = tuple(
        replace(one, run=slow(one.run, 0.02), stage=one.stage and slow(one.stage, 0.005)) for one in eager.steps
    )
    with torch.inference_mode():
        timings = measure(replace(loop, program=replace(eager, steps=steps)), eager, (images(4),)).timings
    assert all(0.012 < heads[-1] < 0.018 for heads in timings.heads[:-1])
    assert not timings.heads_eager
    joined = tuple(replace(step, stage=None) for step in steps)
    with torch.inference_mode():
        timings = measure(replace(loop, program=replace(eager, steps=joined)), eager, (images(4),)).timings
    assert all(heads[-1] < 0.012 for heads in timings.heads)
    assert timings.heads_eager
    table = Plan(timings, (1.0,) * 4).table()
    assert "its head, eager" in [column.header for column in table.columns]


class _Never(Timings):
    def compacts(self, step: int, batch: int, stay: int) -> bool:
        return False


@pytest.mark.parametrize("quantile", [0.3, 0.6, 0.9])
def test_carrying_the_leavers_along_changes_no_answer(ee: exitkit.MultiExitModel, quantile: float) -> None:
    x = images(33)
    engine = exitkit.compile(ee, exitkit.collect(ee, [x]).scores()[:, :-1].quantile(quantile, dim=0).tolist())
    carrying = replace(engine, loop=replace(engine.loop, timings=_Never((1,), (), (), (), ())))
    sizes: list[int] = []
    handles = [
        step.run.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))  # type: ignore[attr-defined]
        for step in engine.loop.program.steps
    ]
    got = carrying(x)
    assert set(sizes) == {33}
    for handle in handles:
        handle.remove()
    expected = engine(x)
    assert torch.equal(got.exit, expected.exit)
    assert len(set(expected.exit.tolist())) > 1
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)


# samples only time ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True])
def test_another_threshold_has_every_exit_again(ee: exitkit.MultiExitModel, skip: bool) -> None:
    """At 2 no sample leaves; at 0, every one leaves at exit 0."""
    engine = exitkit.compile(ee, 2.0, samples=images(32), skip_unprofitable=skip)
    assert engine(images(600)).exit.tolist() == [3] * 600
    expected = exitkit.compile(ee, 0.0)(images(600))
    for again in (engine.at(0.0), engine.at(0.5).at(2.0).at([0.0, 0.9, 0.9])):
        prediction = again(images(600))
        assert prediction.exit.tolist() == [0] * 600
        torch.testing.assert_close(prediction.logits, expected.logits)


@pytest.mark.parametrize("skip", [False, True])
def test_every_exit_is_timed_whatever_the_threshold(ee: exitkit.MultiExitModel, skip: bool) -> None:
    engine = exitkit.compile(ee, 2.0, samples=images(32), skip_unprofitable=skip)
    with steps_that_run(engine.whole or engine.loop.program) as ran:
        exitkit.time_exits(engine, images(4), batches=[4])
    once = [0, 0, 1, 0, 1, 2, 0, 1, 2, 3]  # all leave at exit 0; then at exit 1; …
    assert ran[: len(once)] == once
    assert ran == once * (len(ran) // len(once))


@pytest.mark.parametrize("count", [1, 8, 64])
@pytest.mark.parametrize("easy", [True, False])
def test_the_samples_that_were_timed_decide_nothing_about_others(
    ee: exitkit.MultiExitModel, outputs: ExitOutputs, taus: list[float], count: int, easy: bool
) -> None:
    """Those that all leave at exit 0, or that never leave: no exit is lost because these do not come to it."""
    exits = torch.from_numpy(outputs.exits_at(taus))
    rows = torch.nonzero(exits == (0 if easy else 3)).flatten()[:count]
    assert len(rows) == count
    engine = exitkit.compile(ee, taus, samples=images(600)[rows])
    assert torch.equal(engine(images(600)).exit, exits)
    for row in range(0, 600, 50):
        assert engine(images(600)[row : row + 1]).exit == exits[row]


def test_a_promise_is_kept_to_the_letter(ee: exitkit.MultiExitModel, outputs: ExitOutputs) -> None:
    policy = exitkit.choose_threshold(outputs, max_drop=0.4, risk="disagreement")
    exits = torch.from_numpy(outputs.exits_at(policy))
    assert len(exits.unique()) == 4
    monitor = ShiftMonitor(outputs, policy, window=100, false_alarm=0.01)
    easy = images(600)[exits == 0][:1]
    engine = exitkit.compile(ee, policy, samples=easy, monitor=monitor)
    plain = exitkit.compile(ee, policy)
    assert engine.policy == plain.policy == policy
    for _ in range(5):
        prediction, expected = engine(images(600)), plain(images(600))
        assert torch.equal(prediction.exit, exits)
        assert torch.equal(expected.exit, exits)
        torch.testing.assert_close(prediction.logits, expected.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(prediction.score, expected.score, rtol=1e-5, atol=1e-5)
    assert monitor.report().samples == 3_000
    assert not monitor.alarm
    assert engine.plan().skipped == ()


# exits that are left out ---------------------------------------------------------------------------------------------


def between(sizes: Sequence[int], values: Sequence[float], batch: int) -> float:
    """A measured time at a size between measured ones, on a straight line."""
    for (low, first), (high, second) in zip(
        zip(sizes, values, strict=True), list(zip(sizes, values, strict=True))[1:], strict=False
    ):
        if low <= batch <= high:
            return first + (second - first) * (batch - low) / (high - low)
    return values[0]


def skipped_by_hand(timings: Timings, scores: list[list[float]], taus: Sequence[float]) -> tuple[int, ...]:
    """Exits whose heads and decisions take at least as long as those that leave there would take further on."""
    left = [next((m for m, tau in enumerate(taus) if row[m] > tau), len(taus)) for row in scores]
    skipped = []
    for exit_ in range(len(taus)):
        come, leave = sum(m >= exit_ for m in left), left.count(exit_)
        size = max(come, 1)
        behind = sum(between(timings.sizes, seconds, size) for seconds in timings.seconds[exit_ + 1 :])
        if behind * leave / size <= between(timings.sizes, timings.heads[exit_], size) + timings.decisions[exit_]:
            skipped.append(exit_)
    return tuple(skipped)


def timed(
    engine: exitkit.Engine, seconds: Sequence[float], heads: Sequence[float], growth: Sequence[float] = (1.0, 1.0, 1.0)
) -> exitkit.Engine:
    """The engine as if its steps and heads had taken these times at 1, 16 and 64 samples, each times its growth."""
    assert engine.measured is not None
    timings = Timings(
        sizes=(1, 16, 64),
        seconds=tuple(tuple(one * factor for factor in growth) for one in seconds),
        heads=tuple(tuple(one * factor**2 for factor in growth) for one in (*heads, 0.0)),
        gathers=((1e-3,) * 3,) * len(seconds),
        decisions=(1e-3,) * len(heads),
    )
    return replace(engine, measured=replace(engine.measured, timings=timings))


@pytest.fixture(scope="module")
def skipping(ee: exitkit.MultiExitModel, taus: list[float]) -> exitkit.Engine:
    return exitkit.compile(ee, taus, samples=images(600)[:64], skip_unprofitable=True)


def test_what_is_left_out_follows_from_times_and_scores_at_every_threshold(
    skipping: exitkit.Engine, outputs: ExitOutputs, taus: list[float]
) -> None:
    scores = outputs.scores()[:64, :-1].tolist()
    for engine in (
        timed(skipping, (1.0, 0.5, 0.5, 1.0), (0.2, 0.1, 0.3), growth=(1.0, 1.2, 2.0)),
        timed(skipping, (4.0, 3.0, 2.0, 1.0), (0.5, 1.2, 0.01)),
        timed(skipping, (1.0, 1.0, 1.0, 1.0), (0.9, 0.5, 0.2)),
    ):
        found = set()
        quantiles = torch.tensor(scores).double().quantile(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]).double()).tolist()
        for tau in (*([one] * 3 for one in quantiles), taus, [2.0] * 3, [0.0] * 3, [2.0, 0.5, 2.0]):
            plan = engine.at(tau).plan()
            assert plan.skipped == skipped_by_hand(plan.timings, scores, tau)
            assert plan.timings == engine.plan().timings
            found.add(plan.skipped)
        assert len(found) > 2
        assert (0, 1, 2) in found


def test_left_out_by_hand(skipping: exitkit.Engine, outputs: ExitOutputs) -> None:
    """64 samples, at whatever size a step takes a second: as many leave as their heads need, or not."""
    tau = float(outputs.scores()[:64, 0].sort().values[31])  # 32 of 64 are above: exit 0 saves 3 s · 1/2
    for head, expected in ((1.49, (1, 2)), (1.51, (0, 1, 2))):
        engine = timed(skipping, (1.0,) * 4, (head, 0.1, 0.1)).at([tau, 2.0, 2.0])
        assert engine.plan().skipped == expected
        assert engine(images(600)).exit.unique().tolist() == ([0, 3] if head < 1.5 else [3])


@contextmanager
def exits_that_run(program: Program) -> Iterator[set[int]]:
    """The numbers of the exits that answer anything."""
    ran: set[int] = set()
    handles = [
        step.run.exit.register_forward_hook(lambda *_, number=step.exit: ran.add(number))  # type: ignore[attr-defined]
        for step in program.steps
    ]
    yield ran
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("times", [((4.0, 3.0, 2.0, 1.0), (0.1, 9.0, 0.01)), ((1.0,) * 4, (9.0, 0.1, 9.0))])
def test_heads_that_are_left_out_do_not_run_and_nobody_leaves_there(
    ee: exitkit.MultiExitModel,
    skipping: exitkit.Engine,
    taus: list[float],
    times: tuple[tuple[float, ...], tuple[float, ...]],
) -> None:
    engine = timed(skipping, *times).at(taus)
    skipped = engine.plan().skipped
    assert 0 < len(skipped) < 3
    assert engine.whole is not None
    with exits_that_run(engine.whole) as ran:
        prediction, one = engine(images(600)), engine(images(600)[:1])
        (mapped,) = engine.map([images(600)], 64)
    assert ran == set(range(4)) - set(skipped)
    expected = exitkit.compile(ee, [float("inf") if m in skipped else tau for m, tau in enumerate(taus)])(images(600))
    for got in (prediction, mapped):
        assert torch.equal(got.exit, expected.exit)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert one.exit == expected.exit[0]


def test_exits_of_compiled_steps_are_left_out_too() -> None:
    torch.manual_seed(0)
    ee = noisy(exitkit.attach(TinyNet().eval(), images(), head="conv", at=["blocks.1"], method="sdn"))
    x = images(64)
    tau = float(exitkit.collect(ee, [x]).scores()[:, 0].quantile(0.5))  # between two samples': rounding differs
    engine = exitkit.compile(ee, 2.0, samples=x, optimize=True, skip_unprofitable=True)
    assert engine.plan().skipped == (0,)
    with torch.no_grad():
        torch.testing.assert_close(engine(x).logits, ee.backbone(x), rtol=1e-4, atol=1e-5)
    for head, exits in ((0.4, {0, 1}), (0.6, {1})):  # half of 64 save a second each, or less
        there = timed(engine, (1.0, 1.0), (head,)).at(tau)
        expected = exitkit.compile(ee, tau if head < 0.5 else float("inf"))(x)
        got = there(x)
        assert set(got.exit.tolist()) == exits
        assert torch.equal(got.exit, expected.exit)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_what_would_break_a_promise_is_refused(
    ee: exitkit.MultiExitModel, outputs: ExitOutputs, skipping: exitkit.Engine, taus: list[float]
) -> None:
    policy = exitkit.choose_threshold(outputs, max_drop=0.4, risk="disagreement")
    options: dict[str, Any] = {"samples": images(8), "skip_unprofitable": True}
    for use in (lambda: exitkit.compile(ee, policy, **options), lambda: skipping.at(policy)):
        with pytest.raises(ExitkitError, match=r"leaves exits out, for which the guarantee of the threshold"):
            use()
    monitor = ShiftMonitor(outputs, taus)
    for watch in (lambda: exitkit.compile(ee, taus, monitor=monitor, **options), lambda: skipping.watched(monitor)):
        with pytest.raises(ExitkitError, match=r"leaves exits out, for which the monitor"):
            watch()
    assert skipping.at(policy.at(*taus)).policy.guarantee is None  # its numbers alone promise nothing
    assert exitkit.compile(ee, policy, samples=images(8), monitor=ShiftMonitor(outputs, policy)).policy == policy


@pytest.mark.parametrize("method", ["ztw", "pbee", "gpf"])
def test_an_exit_that_later_ones_read_is_never_left_out(method: str) -> None:
    torch.manual_seed(0)
    ee = noisy(exitkit.attach(TinyNet().eval(), images(), head="conv", method=method))
    assert exitkit.compile(ee, 100.0, samples=images(8)).plan().skipped == ()
    with pytest.raises(ExitkitError, match=r"skip_unprofitable=True needs .*exits that do not read one another"):
        exitkit.compile(ee, 100.0, samples=images(8), skip_unprofitable=True)


def test_patience_reads_exits_one_after_another(ee: exitkit.MultiExitModel) -> None:
    with pytest.raises(ExitkitError, match=r"do not read one another .*criterion='patience'"):
        exitkit.compile(ee, 1.0, criterion="patience", samples=images(8), skip_unprofitable=True)


def test_to_leave_exits_out_takes_samples(ee: exitkit.MultiExitModel) -> None:
    with pytest.raises(ExitkitError, match=r"skip_unprofitable=True needs samples="):
        exitkit.compile(ee, 0.5, skip_unprofitable=True)


# what is shown -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True])
def test_the_plan_is_printed_for_the_engines_threshold(
    ee: exitkit.MultiExitModel, outputs: ExitOutputs, taus: list[float], skip: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = exitkit.compile(ee, 2.0, samples=images(600)[:64], skip_unprofitable=skip)
    plan = engine.plan()
    assert plan.reached == (1.0,) * 4
    assert plan.skipped == ((0, 1, 2) if skip else ())
    assert len(plan.timings.decisions) == 3
    assert all(0 < seconds < 1 for seconds in plan.timings.decisions)
    shown = capsys.readouterr().out
    assert shown.count("skipped: costs more than it saves") == (3 if skip else 0)
    assert shown.count("kept: costs more than it saves") == (0 if skip else 3)
    assert "leave the batch" in shown
    rates = outputs[:64].exit_rates(taus)
    assert engine.at(taus).plan().reached == pytest.approx(tuple(1 - rates[:m].sum() for m in range(4)))


@pytest.mark.parametrize(
    ("samples", "message"),
    [(images(2)[:0], "samples is an empty batch"), (torch.zeros(2, 3, 8, 8), "give images of 1 channel")],
)
def test_samples_that_do_not_fit(ee: exitkit.MultiExitModel, samples: Any, message: str) -> None:
    with pytest.raises(ExitkitError, match=message):
        exitkit.compile(ee, 0.5, samples=samples)


def test_without_samples_there_is_no_plan(ee: exitkit.MultiExitModel) -> None:
    with pytest.raises(ExitkitError, match=r"nothing was measured.*samples="):
        exitkit.compile(ee, 0.5).plan()
