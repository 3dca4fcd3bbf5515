"""``engine.map``: many batches, full stages, answers in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import exitkit
from exitkit import ExitkitError
from tests.toy import TinyNet, images


@pytest.fixture(scope="module")
def engine() -> exitkit.Engine:
    torch.manual_seed(0)
    ee = exitkit.attach(TinyNet().eval(), images(), method="ztw").eval()
    with torch.no_grad():
        for parameter in ee.added_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    scores = exitkit.collect(ee, [images(64)]).scores()[:, :-1]
    return exitkit.compile(ee, scores.quantile(0.6, dim=0).tolist())


def _batches(sizes: list[int]) -> list[Tensor]:
    return [torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("max_wait", [0.0, float("inf")])
def test_answers_come_in_order_and_equal_the_engines(engine: exitkit.Engine, batch_size: int, max_wait: float) -> None:
    batches = _batches([3, 1, 7, 0, 2, 16, 4, 4, 9, 1, 1, 30])
    answers = list(engine.map(iter(batches), batch_size, max_wait))
    assert len(answers) == len(batches)
    seen: set[int] = set()
    for batch, answer in zip(batches, answers, strict=True):
        expected = engine(batch)
        assert torch.equal(answer.exit, expected.exit)
        torch.testing.assert_close(answer.logits, expected.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(answer.score, expected.score, rtol=1e-5, atol=1e-5)
        seen |= set(answer.exit.tolist())
    assert len(seen) > 2


def test_every_stage_runs_full(engine: exitkit.Engine) -> None:
    sizes: list[int] = []
    handles = [
        stage.run.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        for stage in engine.loop.program.steps
    ]
    list(engine.map(_batches([8] * 40), 32))
    for handle in handles:
        handle.remove()
    assert max(sizes) == 32
    assert sum(size == 32 for size in sizes) > len(sizes) - len(handles) - 1  # one remainder a stage


def test_memory_is_bounded_though_the_input_is_not(engine: exitkit.Engine) -> None:
    taken = 0

    def endless() -> Iterator[Tensor]:
        nonlocal taken
        while True:
            taken += 1
            yield images(4)

    answers = engine.map(endless(), 8)
    for count in range(200):
        next(answers)
        assert taken - count <= 64 * 8 // 4 + 2


def test_with_a_latency_bound_nobody_waits_for_others(engine: exitkit.Engine) -> None:
    taken = 0

    def source() -> Iterator[Tensor]:
        nonlocal taken
        for batch in _batches([2] * 10):
            taken += 1
            yield batch

    for count, _ in enumerate(engine.map(source(), 64, max_wait=0.0), 1):
        assert taken == count


def test_loaders_with_labels_and_texts_of_different_lengths() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40, num_labels=3
    )
    ee = exitkit.attach(transformers.BertForSequenceClassification(config).eval(), every=1, method="sdn").eval()
    generator = torch.Generator().manual_seed(0)
    batches = []
    for length in (20, 12, 20, 12):
        ids = torch.randint(1, 99, (3, length), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(3)})
    threshold = float(
        exitkit.collect(ee, [{**b, "labels": b["labels"].long()} for b in batches]).scores()[:, :2].median()
    )
    engine = exitkit.compile(ee, threshold)
    for batch, answer in zip(batches, engine.map(batches, 6), strict=True):
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        torch.testing.assert_close(answer.logits, engine(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_a_failing_stage_names_the_batch_and_loses_nothing(engine: exitkit.Engine) -> None:
    batches = _batches([4] * 6)
    batches[3][1, 0, 0, 0] = 12345.0

    def fail(_: object, args: tuple[Tensor, ...]) -> None:
        if (args[0] == 12345.0).any():
            raise RuntimeError("boom")

    handle = engine.loop.program.steps[0].run.register_forward_pre_hook(fail)
    answers, received = engine.map(batches, 8), []
    with pytest.raises(ExitkitError, match=r"batch 3 failed: RuntimeError: boom.*2 behind it.*\.finished") as error:  # noqa: PT012 - the failure comes midway
        for answer in answers:
            received.append(answer)
    handle.remove()
    assert len(received) == 3
    rest = error.value.finished  # type: ignore[attr-defined]
    assert sorted(rest) == [4, 5]
    assert all(torch.equal(rest[i].exit, engine(batches[i]).exit) for i in rest)


@pytest.mark.parametrize(
    "arguments",
    [{"batch_size": 0}, {"batch_size": 2.5}, {"max_wait": -1.0}, {"max_wait": float("nan")}, {"max_wait": "long"}],
)
def test_arguments_out_of_range(engine: exitkit.Engine, arguments: dict[str, Any]) -> None:
    name, value = next(iter(arguments.items()))
    with pytest.raises(ExitkitError, match=rf"{name}={value!r} must be"):
        engine.map([], **arguments)
    with pytest.raises(ExitkitError, match="batches is int, which yields no batches"):
        engine.map(5)  # type: ignore[arg-type]


def test_a_batch_of_another_kind_is_refused(engine: exitkit.Engine) -> None:
    """In its turn, with its number: the answers before it come first."""
    answers = engine.map([images(2), torch.randn(2, 1, 9, 9)])
    assert len(next(answers).exit) == 2
    with pytest.raises(ExitkitError, match=r"batch 1 failed: .*compiled for"):
        next(answers)
