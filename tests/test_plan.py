"""The plan: what was measured decides where samples leave the batch, and which exits are left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import exitkit
from exitkit import ExitkitError
from exitkit.engine.plan import Plan
from tests.toy import TinyNet, images, noisy

PLAN = Plan(
    sizes=(1, 10, 20),
    seconds=((1.0, 1.0, 1.0), (2.0, 2.0, 4.0), (1.0, 10.0, 20.0)),
    heads=((0.5, 0.5, 0.5), (0.1, 1.0, 2.0), (0.0, 0.0, 0.0)),
    gathers=((0.1, 0.1, 0.1),) * 3,
    decisions=(2e-5, 3e-5),
    reached=(1.0, 0.9, 0.4),
)


@pytest.fixture(scope="module")
def ee() -> exitkit.MultiExitModel:
    torch.manual_seed(0)
    return noisy(exitkit.attach(TinyNet().eval(), images(), head="conv", method="sdn"))


def test_compaction_pays_where_the_next_step_gets_faster_by_more_than_it_takes() -> None:
    assert not PLAN.compacts(1, 10, 5)  # as slow at 5 as at 10
    assert PLAN.compacts(1, 20, 10)  # 2 instead of 4
    assert PLAN.compacts(2, 10, 9)  # 9 instead of 10
    assert not replace(PLAN, gathers=((9.0, 9.0, 9.0),) * 3).compacts(2, 10, 9)
    assert PLAN.compacts(2, 40, 20)  # beyond what was measured, in proportion: 20 instead of 40


def test_an_exit_gains_what_the_leavers_would_have_cost() -> None:
    # A tenth of 20 leaves at exit 0: of the 4 + 20 seconds behind it 2.4 are saved, and its own 0.5 are paid.
    assert PLAN.gain(0, 20) == pytest.approx(2.4 - 0.5)
    # Of the 18 that come to exit 1, 10 leave: 18 seconds behind it, and its head takes 1.8.
    assert PLAN.gain(1, 20) == pytest.approx(18 * 5 / 9 - 1.8)


class _Never(Plan):
    def compacts(self, step: int, batch: int, stay: int) -> bool:
        return False


@pytest.mark.parametrize("quantile", [0.3, 0.6, 0.9])
def test_carrying_the_leavers_along_changes_no_answer(ee: exitkit.MultiExitModel, quantile: float) -> None:
    x = images(33)
    engine = exitkit.compile(ee, exitkit.collect(ee, [x]).scores()[:, :-1].quantile(quantile, dim=0).tolist())
    carrying = replace(engine, loop=replace(engine.loop, plan=_Never((1,), (), (), (), (), ())))
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


def test_exits_that_nobody_takes_are_left_out_and_keep_their_numbers(
    ee: exitkit.MultiExitModel, capsys: pytest.CaptureFixture[str]
) -> None:
    x = images(32)
    engine = exitkit.compile(ee, [2.0, 0.5, 2.0], samples=x)
    plan = engine.plan()
    assert {0, 2} <= set(plan.skipped)
    assert len(plan.decisions) == 3
    assert all(0 < seconds < 1 for seconds in plan.decisions)
    shown = capsys.readouterr().out
    assert "costs more than it saves" in shown
    assert "leave the batch" in shown
    expected = exitkit.compile(ee, [2.0, 2.0 if 1 in plan.skipped else 0.5, 2.0])(x)
    got = engine(x)
    assert torch.equal(got.exit, expected.exit)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["ztw", "pbee"])
def test_an_exit_that_later_ones_read_is_never_left_out(method: str) -> None:
    torch.manual_seed(0)
    ee = noisy(exitkit.attach(TinyNet().eval(), images(), head="conv", method=method))
    assert exitkit.compile(ee, 100.0, samples=images(8)).plan().skipped == ()


@pytest.mark.parametrize(
    ("samples", "message"),
    [(images(2)[:0], "samples is an empty batch"), (torch.zeros(2, 3, 8, 8), "compiled for")],
)
def test_samples_that_do_not_fit(ee: exitkit.MultiExitModel, samples: Any, message: str) -> None:
    with pytest.raises(ExitkitError, match=message):
        exitkit.compile(ee, 0.5, samples=samples)


def test_without_samples_there_is_no_plan(ee: exitkit.MultiExitModel) -> None:
    with pytest.raises(ExitkitError, match=r"nothing was measured.*samples="):
        exitkit.compile(ee, 0.5).plan()
