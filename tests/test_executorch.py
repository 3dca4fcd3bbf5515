"""ExecuTorch packages: one program whose methods are the steps, and which answers as the engine does."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import exitkit
from exitkit import ExitkitError
from tests.test_packages import METHODS, _check, _median
from tests.toy import TinyNet, images, noisy

pytest.importorskip("executorch.runtime", reason="needs executorch, of the release for this torch")


def tiny(method: Any, every: int = 2, head: str = "1L") -> exitkit.MultiExitModel:
    torch.manual_seed(0)
    return noisy(exitkit.attach(TinyNet().eval(), images(), head=head, every=every, method=method))


@pytest.fixture(scope="module")
def ztw() -> exitkit.MultiExitModel:
    return tiny("ztw", 1, "conv")


@pytest.fixture(scope="module")
def package(ztw: exitkit.MultiExitModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "model.pte"
    exitkit.export(ztw, path, _median(ztw, images(64)), labels=["cat", "dog", "owl"])
    return path


def load(path: Path, **arguments: Any) -> Any:
    return exitkit.load(path, trust=True, **arguments)


def test_it_answers_as_the_engine_does(package: Path, ztw: exitkit.MultiExitModel) -> None:
    loaded, engine = load(package), exitkit.compile(ztw, _median(ztw, images(64)))
    for batch in (1, 2, 17):
        torch.testing.assert_close(loaded(images(batch)).logits, engine(images(batch)).logits, rtol=1e-4, atol=1e-5)
    assert len(loaded(images(3)[:0]).exit) == 0
    _check(engine, loaded, images(64))


@pytest.mark.parametrize("method", ["pbee", "final", "gpf"])
def test_what_exits_hand_on(method: str, tmp_path: Path) -> None:
    ee = tiny(METHODS[method], every=2 if method == "final" else 1)
    threshold = 1.0 if method == "pbee" else _median(ee, images(64))
    exitkit.export(ee, tmp_path / "model.pte", threshold)
    _check(exitkit.compile(ee, threshold), load(tmp_path / "model.pte"), images(64))


def test_pools_whose_stride_is_left_out(tmp_path: Path) -> None:
    """torch then moves a window by its own size; ExecuTorch's XNNPACK ended in an IndexError, for heads on maps too."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.linear = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.max_pool2d(self.first(x).relu(), 2)
            x = nn.functional.avg_pool2d(self.second(x).relu(), 2, padding=1, count_include_pad=False)
            logits: Tensor = self.linear(x.mean((2, 3)))
            return logits

    torch.manual_seed(0)
    ee = noisy(exitkit.attach(Pooled().eval(), images(), at=["first"], head="1L", method="sdn"))
    exitkit.export(ee, tmp_path / "model.pte", 2.0)
    with torch.no_grad():
        expected = ee(images(5)).logits
    for threshold, logits in zip((-1.0, 2.0), expected, strict=True):
        got = load(tmp_path / "model.pte", threshold=threshold)(images(5)).logits
        torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("criterion", ["entropy", "margin"])
def test_criteria_and_temperatures(criterion: str, tmp_path: Path) -> None:
    ee = tiny("sdn")
    x = images(64)
    scores = exitkit.collect(ee, [(x, torch.zeros(64, dtype=torch.int64))]).scores(criterion)[:, 0]
    policy = exitkit.ExitPolicy((float(scores.median()),), criterion, temperatures=(1.5, 1.0))
    exitkit.export(ee, tmp_path / "model.pte", policy)
    loaded, engine = load(tmp_path / "model.pte"), exitkit.compile(ee, policy)
    assert loaded.policy == policy
    near = (engine(x).score - policy.thresholds[0]).abs() < 1e-5
    assert torch.equal(loaded(x).exit[~near], engine(x).exit[~near])
    torch.testing.assert_close(loaded(x).score, engine(x).score, rtol=1e-5, atol=1e-6)


def test_scores_next_to_certainty_keep_double_precision(tmp_path: Path) -> None:
    """In single precision every score of these samples is 1, so that τ = 1 − 1e−9 would let all of them leave, or none."""
    ee = tiny("sdn")
    x = images(64)
    with torch.no_grad():
        [parameter.mul_(3) for name, parameter in ee.classifiers[0].named_parameters() if "norm" not in name]
    scores = exitkit.compile(ee, -1.0)(x).score
    close = (scores > 1 - 1e-8) & (scores < 1)
    assert int(close.sum()) > 3
    exitkit.export(ee, tmp_path / "model.pte", -1.0)
    got = load(tmp_path / "model.pte")(x[close]).score
    assert got.dtype == torch.float64
    assert len(got.float().unique()) == 1
    torch.testing.assert_close((1 - got).log(), (1 - scores[close]).log(), rtol=0.02, atol=0)


def test_the_file_is_read_without_exitkit(package: Path, ztw: exitkit.MultiExitModel) -> None:
    """The loop of a phone: each method takes what the one before it returned, without answer and score."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(package.read_bytes())
    thresholds = program.load_method("thresholds").execute([])[0].tolist()
    assert json.loads(program.load_method("manifest").execute([])[0])["labels"] == ["cat", "dog", "owl"]
    expected = exitkit.compile(ztw, thresholds)(images(64))
    for row, sample in enumerate(images(64).split(1)):
        values: list[Tensor] = [sample]
        for m, threshold in enumerate([*thresholds, -torch.inf]):
            *values, answer, score = program.load_method(f"step_{m}").execute(values)
            if float(score) > threshold:
                break
        assert m == int(expected.exit[row])
        torch.testing.assert_close(answer[0], expected.logits[row], rtol=1e-4, atol=1e-5)


def test_what_is_behind_a_taken_exit_does_not_run(package: Path) -> None:
    loaded = load(package)
    calls: list[int] = []

    def counted(step: Any) -> Any:
        def run(*tensors: Tensor) -> Any:
            calls.append(step.exit)
            return step.run(*tensors)

        return run

    program = loaded.loop.program
    steps = tuple(replace(step, run=counted(step)) for step in program.steps)
    engine = replace(loaded, loop=replace(loaded.loop, program=replace(program, steps=steps)))
    for sample in images(64).split(1):
        calls.clear()
        exit_ = int(engine(sample).exit)
        assert calls == list(range(exit_ + 1))


def test_thresholds_monitors_and_devices(package: Path, ztw: exitkit.MultiExitModel) -> None:
    everyone = load(package, threshold=2.0)(images(5))
    assert everyone.exit.tolist() == [3] * 5
    with torch.no_grad():
        torch.testing.assert_close(everyone.logits, ztw.backbone(images(5)), rtol=1e-4, atol=1e-5)
    assert load(package, threshold=-1.0)(images(5)).exit.tolist() == [0] * 5
    with pytest.raises(ExitkitError, match=r"runs in ExecuTorch on CPU; export a \.pt2"):
        load(package, device="cuda")
    with pytest.raises(ExitkitError, match=r"input 0 has shape \(2, 1, 9, 9\)"):
        load(package)(torch.zeros(2, 1, 9, 9))


def test_it_asks_for_trust(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exitkit.packages.loading._warned", set())
    with pytest.warns(UserWarning, match=r"does not check a \.pte in full.*made or trust"):
        exitkit.load(package)


def test_damaged_and_foreign_files_do_not_reach_executorch(package: Path, tmp_path: Path) -> None:
    content = package.read_bytes()
    cases = {
        "cut": content[: len(content) // 2],
        "flipped": content[:64] + struct.pack("<I", 0xFFFFFFFF) + content[68:],
        "longer": content + b"\0",
        "unsigned": content[:-79],
        "empty": b"",
        "text": b"not a program",
    }
    for name, damaged in cases.items():
        path = tmp_path / f"{name}.pte"
        path.write_bytes(damaged)
        with pytest.raises(ExitkitError, match=r"is damaged, or not a package of exitkit"):
            load(path)
    with pytest.raises(ExitkitError, match=r"nowhere\.pte' does not exist"):
        load(tmp_path / "nowhere.pte")


def test_texts_have_the_examples_length(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        initializer_range=0.3,
    )  # fmt: skip
    ids = torch.randint(1, 99, (8, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[::2, 7:] = 0
    texts = {"input_ids": ids, "attention_mask": mask}
    model = transformers.BertForSequenceClassification(config).eval()
    ee = noisy(exitkit.attach(model, {name: value[:2] for name, value in texts.items()}, every=1, method="ztw"))
    exitkit.export(ee, tmp_path / "model.pte", 0.7)
    loaded, engine = load(tmp_path / "model.pte"), exitkit.compile(ee, 0.7)
    assert torch.equal(loaded(**texts).exit, engine(**texts).exit)
    torch.testing.assert_close(loaded(**texts).logits, engine(**texts).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ExitkitError, match=r"was compiled for \(batch, 12\)"):
        loaded(**{name: value[:, :9] for name, value in texts.items()})


def test_other_answers_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exitkit.packages import executorch

    read = executorch.read_executorch

    def off(content: bytes, source: str) -> Any:
        manifest, runs = read(content, source)
        return manifest, [*runs[:-1], lambda *tensors: [value * 1.1 for value in runs[-1](*tensors)]]

    (tmp_path / "model.pte").write_text("older")
    monkeypatch.setattr("exitkit.packages.exporting.read_executorch", off)
    with pytest.raises(ExitkitError, match=r"gives other values when exported .* nothing was written"):
        exitkit.export(tiny("sdn"), tmp_path / "model.pte", 0.5)
    assert (tmp_path / "model.pte").read_text() == "older"
