"""OpenVINO reads what the ONNX packages hold: the graph with ``If``, and the stages with the loop outside."""

from __future__ import annotations

import json
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import exitkit
from tests.test_packages import METHODS, _median
from tests.toy import TinyNet, images, noisy

openvino = pytest.importorskip("openvino", reason="needs openvino")
pytest.importorskip("onnxruntime", reason="needs exitkit[onnx]")


def compiled(path: Path) -> Any:
    """In single precision; half of it is OpenVINO's choice on some processors."""
    return openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def stages(package: Path) -> tuple[dict[str, Any], list[Any]]:
    """Manifest and compiled steps, read without exitkit."""
    with zipfile.ZipFile(package) as archive:
        manifest = json.loads(archive.read("manifest.json"))
        for index in range(len(manifest["steps"])):
            (package.parent / f"{index}.onnx").write_bytes(archive.read(f"steps/{index}"))
    return manifest, [compiled(package.parent / f"{index}.onnx") for index in range(len(manifest["steps"]))]


@pytest.mark.parametrize("method", ["sdn", "pbee", "ztw"])
def test_the_graph_with_branches_answers_as_the_engine_does(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    every = 1 if method == "pbee" else 2
    ee = noisy(exitkit.attach(TinyNet().eval(), images(), head="1L", every=every, method=METHODS[method]))
    threshold = 1.0 if method == "pbee" else _median(ee, images(64))
    exitkit.export(ee, tmp_path / "model.onnx", threshold)
    expected, graph = exitkit.compile(ee, threshold)(images(64)), compiled(tmp_path / "model.onnx")
    answers = [graph(sample.numpy()) for sample in images(64).split(1)]
    exits = torch.tensor([int(answer[1].item()) for answer in answers])
    assert len(exits.unique()) > 1
    assert torch.equal(exits, expected.exit)
    logits = torch.from_numpy(np.concatenate([answer[0] for answer in answers]))
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_texts_of_any_length(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        initializer_range=0.3,
    )  # fmt: skip
    ee = noisy(exitkit.attach(transformers.BertForSequenceClassification(config).eval(), every=1, method="sdn"))
    exitkit.export(ee, tmp_path / "model.onnx", 0.7)
    engine, graph = exitkit.compile(ee, 0.7), compiled(tmp_path / "model.onnx")
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    keys = {entry["name"]: entry["key"] for entry in json.loads(metadata["exitkit"])["inputs"]}
    for length in (5, 12, 31):
        ids = torch.randint(1, 99, (1, length), generator=torch.Generator().manual_seed(length))
        texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        answer, expected = graph({name: texts[key].numpy() for name, key in keys.items()}), engine(**texts)
        assert int(answer[1].item()) == int(expected.exit)
        torch.testing.assert_close(torch.from_numpy(answer[0]), expected.logits, rtol=1e-4, atol=1e-5)


def test_stages_with_the_loop_outside_take_batches(tmp_path: Path) -> None:
    """The loop of the guide: those who are sure leave, the others go on."""
    torch.manual_seed(0)
    ee = noisy(exitkit.attach(TinyNet().eval(), images(), head="1L", every=1, method="ztw"))
    x, threshold = images(64), _median(ee, images(64))
    exitkit.export(ee, tmp_path / "model.onnx.zip", threshold)
    manifest, steps = stages(tmp_path / "model.onnx.zip")
    values = {manifest["inputs"][0]["name"]: x.numpy()}
    rows, logits, exits = np.arange(64), np.zeros((64, 3), np.float32), np.full(64, -1)
    for m, (entry, step) in enumerate(zip(manifest["steps"], steps, strict=True)):
        *made, answer, score = step([values[name] for name in entry["inputs"]]).to_tuple()
        values |= dict(zip(entry["outputs"], made, strict=True))
        last = m == len(steps) - 1
        leaves = np.full(len(rows), True) if last else score > manifest["policy"]["thresholds"][m]
        logits[rows[leaves]], exits[rows[leaves]] = answer[leaves], m
        rows = rows[~leaves]
        values = {name: values[name][~leaves] for name in entry["live"]}
        if not len(rows):
            break
    expected = exitkit.compile(ee, threshold)(x)
    assert len(expected.exit.unique()) > 2
    assert exits.tolist() == expected.exit.tolist()
    torch.testing.assert_close(torch.from_numpy(logits), expected.logits, rtol=1e-4, atol=1e-5)


def test_scores_next_to_certainty_are_in_single_precision(tmp_path: Path) -> None:
    """The limit that the guide names: in the engine these scores are below 1."""
    torch.manual_seed(0)
    ee = noisy(exitkit.attach(TinyNet().eval(), images(), head="1L", every=2, method="sdn"))
    with torch.no_grad():
        [parameter.mul_(8) for name, parameter in ee.classifiers[0].named_parameters() if "norm" not in name]
    scores = exitkit.compile(ee, -1.0)(images(64)).score
    close = (scores > 1 - 1e-9) & (scores < 1)
    assert close.any()
    exitkit.export(ee, tmp_path / "model.onnx.zip", -1.0)
    _, (step, *_) = stages(tmp_path / "model.onnx.zip")
    score = step(images(64).numpy()).to_tuple()[-1]
    assert score.dtype == np.float64
    assert set(score[close.numpy()]) == {1.0}


class _HeavyTail(nn.Module):
    """Nearly all of the work is behind the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Conv2d(1, 64, 3, padding=1), *(nn.Conv2d(64, 64, 3, padding=1) for _ in range(8))
        )
        self.linear = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.blocks(x).mean((2, 3)))
        return out


def test_what_is_behind_a_taken_exit_costs_no_time(tmp_path: Path) -> None:
    x = torch.randn(1, 1, 48, 48)
    ee = exitkit.attach(_HeavyTail().eval(), x.expand(2, -1, -1, -1), at=["blocks.0"], method="sdn", head="1L").eval()
    fastest = {}
    for threshold in (-1.0, 2.0):
        exitkit.export(ee, tmp_path / "model.onnx", threshold)
        graph = compiled(tmp_path / "model.onnx")
        assert int(graph(x.numpy())[1].item()) == (0 if threshold < 0 else 1)
        seconds = []
        for _ in range(30):
            started = time.perf_counter()
            graph(x.numpy())
            seconds.append(time.perf_counter() - started)
        fastest[threshold] = min(seconds)
    assert fastest[-1.0] < fastest[2.0] / 3, fastest
