"""The CUDA path as far as a CPU shows it: the kernel in Triton's interpreter, graphs with a recorder that replays by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import exitkit
from exitkit.engine import decision
from exitkit.engine.cuda.buckets import Buckets
from exitkit.engine.cuda.graphs import Graphed, graphed
from tests.toy import TinyNet, images, noisy


def _record_by_hand(
    run: Callable[..., Sequence[Tensor]], buffers: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Callable[[], None]]:
    """Runs again on the same buffers, into the same outputs, as a CUDA graph does."""
    outputs = [output.clone() for output in run(*buffers)]

    def replay() -> None:
        for output, made in zip(outputs, run(*buffers), strict=True):
            output.copy_(made)

    return outputs, replay


@given(largest=st.integers(1, 600), batch=st.integers(1, 600))
def test_a_bucket_holds_its_batch_with_little_padding(largest: int, batch: int) -> None:
    buckets = Buckets.up_to(largest)
    size = buckets.of(batch)
    assert list(buckets.sizes) == sorted(set(buckets.sizes))
    assert buckets.sizes[-1] == largest
    if batch > largest:
        assert size is None
    else:
        assert size is not None
        assert batch <= size <= max(batch + 3, batch * 1.25)


@pytest.fixture(scope="module")
def ee() -> exitkit.MultiExitModel:
    torch.manual_seed(0)
    return noisy(exitkit.attach(TinyNet().eval(), images(), head="conv", method="ztw"))


def test_recorded_steps_answer_as_the_engine_does(ee: exitkit.MultiExitModel) -> None:
    x = images(64)
    engine = exitkit.compile(ee, exitkit.collect(ee, [x]).scores()[:, :-1].quantile(0.6, dim=0).tolist())
    recorded = replace(engine, loop=replace(engine.loop, program=graphed(engine.loop.program, 32, _record_by_hand)))
    for size in (1, 3, 11, 32, 64, 11, 1):  # 64 is above the largest bucket
        expected, got = engine(x[:size]), recorded(x[:size])
        assert torch.equal(got.exit, expected.exit)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.score, expected.score, rtol=1e-5, atol=1e-5)
    assert len(set(engine(x).exit.tolist())) > 2


def test_answers_outlive_the_next_replay(ee: exitkit.MultiExitModel) -> None:
    engine = exitkit.compile(ee, 0.9)
    recorded = replace(engine, loop=replace(engine.loop, program=graphed(engine.loop.program, 8, _record_by_hand)))
    first = recorded(images(8))
    kept = [part.clone() for part in first]
    recorded(images(8) * 5)
    assert all(torch.equal(now, before) for now, before in zip(first, kept, strict=True))


def test_one_recording_for_each_bucket() -> None:
    recordings: list[int] = []

    def record(
        run: Callable[..., Sequence[Tensor]], buffers: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Callable[[], None]]:
        recordings.append(len(buffers[0]))
        return _record_by_hand(run, buffers)

    step = Graphed(lambda x: [x * 2], (0,), (0,), Buckets.up_to(64), record)
    for size in (9, 10, 11, 12, 9, 33, 64, 65):
        assert torch.equal(step(torch.ones(size, 2))[0], torch.full((size, 2), 2.0))
    assert recordings == [12, 40, 64]


_CASES = """
import torch
from exitkit.engine import batch_state, decision
from exitkit.engine.cuda import kernels
for seed in range(60):
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, 70, (1,), generator=generator))
    fault = torch.rand(size, generator=generator)
    score = torch.rand(size, generator=generator, dtype=torch.float64)
    if seed % 4 == 0:  # all 1 in float32
        score = 1 - 1e-9 * score
    threshold = float(score[0]) if seed % 3 == 0 or seed % 4 == 0 else 1.2 * float(torch.rand(1, generator=generator)) - 0.1
    score[torch.rand(size, generator=generator) < 0.1] = float("nan")
    rows = torch.where(torch.rand(size, generator=generator) < 0.2, -1, torch.arange(size))
    got, expected = (module.split(score, rows, fault, threshold) for module in (kernels, decision))
    for one, other in zip(got, expected, strict=True):
        for name, column in vars(other).items():
            assert torch.equal(getattr(one, name).nan_to_num(2), column.nan_to_num(2)), (seed, name, got, expected)
int64, half = torch.int64, torch.float16
for shape, dtype in (((70,), int64), ((70, 1000), torch.float32), ((70, 3, 7, 50), half), ((70, 5), torch.bool)):
    value = torch.randn(shape).to(dtype)
    for index in (torch.tensor([69, 0, 3]), torch.arange(70), torch.tensor([], dtype=torch.int64)):
        assert torch.equal(kernels.gather(value, index), batch_state.gather(value, index)), (shape, dtype)
print("alike")
"""


def test_the_kernels_decide_and_gather_as_plain_torch() -> None:
    """In a process of its own: Triton reads the switch to its interpreter when it is imported."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", _CASES], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "alike", done.stderr


_COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from exitkit.engine.cuda import kernels
columns = dict.fromkeys(("index", "rows", "rows_out"), "*i64") | dict.fromkeys(("size", "width"), "i32")
floats = dict.fromkeys(("fault", "fault_out", "source", "target"), "*fp32")
doubles = dict.fromkeys(("score", "score_out", "threshold"), "*fp64")
types = columns | floats | doubles | {"counts": "*i32", "BLOCK": "constexpr"}
for kernel in (kernels._split_kernel, kernels._gather_kernel):
    names = kernel.arg_names  # BLOCK is the last
    source = triton.compiler.ASTSource(kernel, {name: types[name] for name in names}, {(len(names) - 1,): 256})
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
print("compiled")
"""


def test_the_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", _COMPILED], capture_output=True, text=True)
    assert done.stdout.strip() == "compiled", done.stderr


def test_a_score_that_equals_the_threshold_stays_and_so_does_one_that_is_no_number() -> None:
    score = torch.tensor([0.7, 0.1, 0.7, 0.9, float("nan"), 0.9])
    rows, fault = torch.tensor([0, 1, 2, 3, 4, -1]), 2 * score
    leave, stay = decision.split(score, rows, fault, float(score[0]))
    assert (leave.rows.tolist(), stay.rows.tolist()) == ([3], [0, 1, 2, 4])
    assert (leave.places.tolist(), leave.fault.tolist()) == ([3], [float(fault[3])])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimize", [False, True])
def test_on_cuda_the_engine_answers_as_on_cpu(ee: exitkit.MultiExitModel, optimize: bool) -> None:
    x = images(64)
    thresholds = exitkit.collect(ee, [x]).scores()[:, :-1].quantile(0.6, dim=0).tolist()
    expected = exitkit.compile(ee, thresholds)(x)
    try:
        engine = exitkit.compile(ee.cuda(), thresholds, optimize=optimize)
        got = engine(x.cuda())
    finally:
        ee.cpu()
    same = got.exit.cpu() == expected.exit
    assert same.float().mean() > 0.95  # rounding decides near a threshold
    torch.testing.assert_close(got.logits.cpu()[same], expected.logits[same], rtol=1e-2, atol=1e-2)
