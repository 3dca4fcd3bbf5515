"""Packages: what was exported answers as the engine does, without the model's code."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import exitkit
from exitkit import ExitkitError
from exitkit.engine.aot import compile_step
from exitkit.engine.exported import example_of, export_steps
from exitkit.engine.lowering import program_of
from tests.test_hardening_packages import edited
from tests.toy import TinyNet, images, noisy

METHODS = {
    "sdn": "sdn",
    "pbee": "pbee",
    "ztw": "ztw",
    "final": exitkit.ZTW(ensemble="additive", ensemble_final=True),
    "gpf": "gpf",
}


@pytest.fixture(scope="module")
def models() -> dict[str, exitkit.MultiExitModel]:
    torch.manual_seed(0)
    net = TinyNet().eval()
    every = {name: 1 if name in ("pbee", "gpf") else 2 for name in METHODS}  # a single exit agrees with itself alone
    return {
        name: noisy(exitkit.attach(net, images(), head="conv", every=every[name], method=method))
        for name, method in METHODS.items()
    }


def _threshold(ee: exitkit.MultiExitModel) -> float:
    """τ that half of the samples pass."""
    if ee.method.criterion == "patience":
        return 1.0
    return _median(ee, images(64))


def _median(ee: exitkit.MultiExitModel, x: Tensor) -> float:
    """Between two scores, so that rounding decides nothing."""
    low, high = (
        exitkit.collect(ee, [x]).scores()[:, 0].sort().values.unique().quantile(torch.tensor([0.49, 0.51]).double())
    )
    return float(low + high) / 2


def test_autocast_around_surgery_changes_nothing(tmp_path: Path) -> None:
    """Its casts became part of the engine's graph; export ended in an error of torch's."""
    net, x = TinyNet().eval(), images(8)
    torch.manual_seed(0)
    plain = exitkit.attach(net, images(), every=2, head="1L", method="sdn")
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        ee = exitkit.attach(net, images(), every=2, head="1L", method="sdn")
        engine = exitkit.compile(ee, 0.4)
        exitkit.export(ee, tmp_path / "model.pt2", threshold=0.4)
    expected = exitkit.compile(plain, 0.4)(x)
    for one in (engine, exitkit.load(tmp_path / "model.pt2", trust=True)):
        assert torch.equal(one(x).exit, expected.exit)
        assert torch.allclose(one(x).logits, expected.logits, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(engine.at(1.1)(x).logits, net(x))


@pytest.fixture(scope="module")
def package(models: dict[str, exitkit.MultiExitModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    exitkit.export(models["ztw"], path, 0.5, labels=["cat", "dog", "owl"])
    return path


def _check(engine: Any, loaded: Any, x: Tensor) -> None:
    expected, got = engine(x), loaded(x)
    assert len(set(expected.exit.tolist())) > 1  # or nothing was tested
    assert torch.equal(expected.exit, got.exit)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.score, expected.score, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_package_answers_as_the_engine_does(
    models: dict[str, exitkit.MultiExitModel], method: str, tmp_path: Path
) -> None:
    threshold = _threshold(models[method])
    exitkit.export(models[method], tmp_path / "model.pt2", threshold)
    loaded, engine = exitkit.load(tmp_path / "model.pt2"), exitkit.compile(models[method], threshold)
    for batch in (1, 2, 17):
        torch.testing.assert_close(loaded(images(batch)).logits, engine(images(batch)).logits, rtol=1e-5, atol=1e-6)
    _check(engine, loaded, images(64))


@pytest.mark.parametrize("ending", [".onnx", ".onnx.zip"])
@pytest.mark.parametrize("method", ["sdn", "pbee", "ztw"])
def test_onnxruntime_answers_as_the_engine_does(
    models: dict[str, exitkit.MultiExitModel], method: str, ending: str, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / f"model{ending}"
    threshold = _threshold(models[method])
    exitkit.export(models[method], path, threshold)
    _check(exitkit.compile(models[method], threshold), exitkit.load(path), images(64))
    assert len(exitkit.load(path)(images(3)[:0]).exit) == 0


class InPlace(nn.Module):
    """After every block the first ``width`` of eight features are written over."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.blocks, self.last = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x[:, : self.width].sub_(0.5)
        for block in self.blocks:
            x = block(x)
            x[:, : self.width].relu_()
        return self.last(x)


@pytest.mark.parametrize("ending", [".pt2", ".onnx", ".onnx.zip"])
@pytest.mark.parametrize("width", [8, 4])
def test_stages_that_write_into_their_input(width: int, ending: str, tmp_path: Path) -> None:
    """The comparison ran on what the model had written over, so that no such model could be exported."""
    torch.manual_seed(0)
    model, x = InPlace(width).eval(), torch.randn(40, 8)
    ee = exitkit.attach(model, x[:2].clone(), every=1, method="sdn")
    threshold = _median(ee, x.clone())
    exitkit.export(ee, tmp_path / f"model{ending}", threshold)
    prediction = exitkit.load(tmp_path / f"model{ending}", trust=True)(x.clone())
    assert len(prediction.exit.unique()) > 1
    with torch.no_grad():
        expected = torch.stack([*ee(x.clone()).logits])[prediction.exit, torch.arange(40)]
    assert torch.allclose(prediction.logits, expected, atol=1e-5)
    assert torch.equal(prediction.exit, exitkit.compile(ee, threshold)(x.clone()).exit)


def test_what_is_behind_an_exit_is_inside_its_branch(
    models: dict[str, exitkit.MultiExitModel], tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    exitkit.export(models["sdn"], tmp_path / "model.onnx", 0.5)
    graph = onnx.load(tmp_path / "model.onnx").graph
    branches = [node for node in graph.node if node.op_type == "If"]
    assert len(branches) == 1
    convolutions = [sum(node.op_type == "Conv" for node in part.node) for part in (graph, _stay(branches[0]))]
    # Of the nine in the backbone, stem and two blocks come before the exit with its own one, two blocks after it.
    assert convolutions == [6, 4]


def _stay(node: Any) -> Any:
    return next(attribute.g for attribute in node.attribute if attribute.name == "else_branch")


def test_it_runs_in_a_process_that_never_saw_the_model(package: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch, exitkit\n"
        f"engine = exitkit.load({str(package)!r})\n"
        "answer = engine(torch.zeros(2, 1, 8, 8))\n"
        "print(list(answer.logits.shape), engine.description.labels)\n"
        "print([name for name in ('tests', 'timm', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[2, 3] ('cat', 'dog', 'owl')", "[]"]


def test_another_threshold_than_the_packages(package: Path, models: dict[str, exitkit.MultiExitModel]) -> None:
    loaded = exitkit.load(package, threshold=2.0)
    assert loaded(images(5)).exit.tolist() == [1] * 5
    with torch.no_grad():
        torch.testing.assert_close(loaded(images(5)).logits, models["ztw"].backbone(images(5)))
    assert [name for name, _ in exitkit.load(package).description.exits] == ["blocks.1", "backbone"]  # type: ignore[union-attr]


def test_texts_of_any_length(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        initializer_range=0.3, id2label={0: "no", 1: "yes"},
    )  # fmt: skip
    ee = noisy(exitkit.attach(transformers.BertForSequenceClassification(config).eval(), every=1, method="sdn"))
    exitkit.export(ee, tmp_path / "model.pt2", 0.7)
    loaded, engine = exitkit.load(tmp_path / "model.pt2"), exitkit.compile(ee, 0.7)
    assert loaded.description is not None
    assert loaded.description.labels == ("no", "yes")
    for batch, length in ((1, 5), (6, 31)):
        ids = torch.randint(1, 99, (batch, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0
        one, other = loaded(input_ids=ids, attention_mask=mask), engine(input_ids=ids, attention_mask=mask)
        assert torch.equal(one.exit, other.exit)
        torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-5)


def test_attention_over_windows_as_onnx(tmp_path: Path) -> None:
    """Swin's windows are part of the batch, and its reshapes rely on strides that ONNX's attention does not leave."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=3
    )
    x = torch.randn(8, 3, 16, 16)
    ee = noisy(exitkit.attach(transformers.SwinForImageClassification(config).eval(), x[:2], every=1, method="sdn"))
    exitkit.export(ee, tmp_path / "model.onnx.zip", _median(ee, x))
    _check(exitkit.compile(ee, _median(ee, x)), exitkit.load(tmp_path / "model.onnx.zip"), x)


def test_compiled_stages(models: dict[str, exitkit.MultiExitModel], tmp_path: Path) -> None:
    """Convolutions with BatchNorm, whose maps are handed on in another memory format, to be compacted in it."""
    ee, x = models["sdn"], images(64)
    threshold = _threshold(ee)
    exitkit.export(ee, tmp_path / "model.pt2", threshold, optimize=True)
    loaded, engine = exitkit.load(tmp_path / "model.pt2"), exitkit.compile(ee, threshold)
    _check(engine, loaded, x)
    for batch in (1, 5):
        torch.testing.assert_close(loaded(x[:batch]).logits, engine(x[:batch]).logits, rtol=1e-4, atol=1e-5)
    edited(tmp_path / "model.pt2", tmp_path / "model.pt2", lambda manifest: manifest["versions"].update(torch="1.0"))
    with pytest.raises(ExitkitError, match=r"compiled by torch 1\.0; this is torch .*export it again"):
        exitkit.load(tmp_path / "model.pt2")
    with pytest.raises(ExitkitError, match=r"device='cuda'.*was compiled for cpu"):
        exitkit.load(tmp_path / "model.pt2", device="cuda")


def test_a_damaged_package(package: Path, tmp_path: Path) -> None:
    content = package.read_bytes()
    cases = {
        "cut": content[: len(content) // 2],
        "flipped": content[:5000] + bytes([content[5000] ^ 255]) + content[5001:],
        "text": b"not a zip",
    }
    for name, damaged in cases.items():
        path = tmp_path / f"{name}.pt2"
        path.write_bytes(damaged)
        with pytest.raises(ExitkitError, match=r"is damaged or cut short"):
            exitkit.load(path)


def test_a_package_of_another_kind(package: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.pt2"
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("data.pkl", b"")
    with pytest.raises(ExitkitError, match=r"is not a package of exitkit"):
        exitkit.load(foreign)
    newer = tmp_path / "newer.pt2"
    newer.write_bytes(package.read_bytes())
    edited(newer, newer, lambda manifest: manifest.update(format="exitkit-package-9"))
    with pytest.raises(ExitkitError, match=r"is a exitkit-package-9.*update exitkit"):
        exitkit.load(newer)
    with pytest.raises(ExitkitError, match=r"nowhere\.pt2' does not exist"):
        exitkit.load(tmp_path / "nowhere.pt2")
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(ExitkitError, match=r"folder\.pt2' is a folder; name a file"):
        exitkit.load(tmp_path / "folder.pt2")
    for device in ("gpu", [0]):
        with pytest.raises(ExitkitError, match=r"device=.* is not a device of torch; give 'cpu', 'cuda'"):
            exitkit.load(package, device=device)
    if not torch.backends.mps.is_available():
        with pytest.raises(exitkit.ArgumentError, match=r"device='mps' cannot be used .*MPS.*use device='cpu'"):
            exitkit.load(package, device="mps")
    if not torch.cuda.is_available():
        with pytest.raises(ExitkitError, match=r"no CUDA device"):
            exitkit.load(package, device="cuda")


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("model.bin", {}, r"must end in \.pt2, \.onnx, \.onnx\.zip or \.pte"),
        ("model.onnx", {"optimize": True}, r"optimize=True compiles \.pt2"),
        ("model.pt2", {"labels": ["a", "b"]}, r"labels has 2 names; the model has 3 classes"),
        ("model.pt2", {"labels": 3}, r"labels=3 must be a list of names"),
        ("model.pt2", {"preprocessing": "resize"}, r"preprocessing is str; give exitkit\.ImagePreprocessing"),
        ("model.pt2", {"criterion": "sureness"}, r"criterion='sureness' is unknown"),
        ("model.pt2", {"tokenizer": object()}, r"tokenizer is a object without a fast backend"),
    ],
)
def test_arguments_out_of_range(
    models: dict[str, exitkit.MultiExitModel], tmp_path: Path, path: str, arguments: dict[str, Any], message: str
) -> None:
    (tmp_path / path).write_text("older")
    with pytest.raises(ExitkitError, match=message):
        exitkit.export(models["sdn"], tmp_path / path, 0.5, **arguments)
    assert (tmp_path / path).read_text() == "older"


@pytest.mark.parametrize("ending", ["onnx", "onnx.zip"])
def test_missing_onnx_is_said_before_anything_is_captured(
    models: dict[str, exitkit.MultiExitModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("captured"))
    with pytest.raises(ExitkitError, match=r"writing ONNX needs onnx and onnxscript: pip install"):
        exitkit.export(models["sdn"], tmp_path / f"model.{ending}", 0.5)


def test_a_single_graph_has_its_thresholds_fixed(models: dict[str, exitkit.MultiExitModel], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    exitkit.export(models["sdn"], tmp_path / "model.onnx", 0.5)
    with pytest.raises(ExitkitError, match=r"thresholds in the graph"):
        exitkit.load(tmp_path / "model.onnx", threshold=0.9)
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "model.onnx").read_bytes()[:100])
    with pytest.raises(ExitkitError, match=r"this is not an ONNX graph"):
        exitkit.load(tmp_path / "cut.onnx")


def test_executorch_is_asked_for(
    models: dict[str, exitkit.MultiExitModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("executorch", "executorch.exir", "executorch.runtime"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ExitkitError, match=r"needs executorch.*pip install 'exitkit\[executorch\]'"):
        exitkit.export(models["sdn"], tmp_path / "model.pte", 0.5)
    assert not (tmp_path / "model.pte").exists()


class _Forgets(nn.Module):
    """A linear model whose exit's head overflows on large inputs, and whose backbone does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.classify = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classify(torch.relu(self.second(torch.relu(self.first(x)))))
        return logits


@pytest.mark.parametrize("ending", ["onnx", "onnx.zip", "pt2"])
def test_a_score_that_is_not_finite_on_the_way_is_reported(ending: str, tmp_path: Path) -> None:
    """NaN at exit 0, and a finite score at the exit that is taken."""
    if ending.startswith("onnx"):
        pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    ee = exitkit.attach(_Forgets().eval(), torch.ones(2, 1), every=1, method="sdn", head="1L").eval()
    with torch.no_grad():
        for parameter in [*ee.backbone.parameters(), *ee.classifiers.parameters()]:
            parameter.zero_()
        ee.backbone.first.weight.fill_(1.0)  # type: ignore[union-attr]
        (weight,) = (one for one in ee.classifiers[0].parameters() if one.shape == (2, 1))
        weight[0] = 1e35
    x = torch.tensor([[1.0], [1e5], [0.0], [2e4]])
    assert ee(x).logits[0].log_softmax(-1).isnan().any(1).tolist() == [False, True, False, True]
    assert ee(x).logits[1].isfinite().all()
    exitkit.export(ee, tmp_path / f"model.{ending}", 0.9)
    for answers in (exitkit.compile(ee, 0.9), exitkit.load(tmp_path / f"model.{ending}")):
        prediction = answers(x)
        assert prediction.exit.tolist() == [0, 1, 1, 1]
        assert prediction.non_finite.tolist() == [False, True, False, True]
        assert prediction.score.isfinite().all()
        assert [bool(answers(row).non_finite) for row in x.split(1)] == [False, True, False, True]


def test_bfloat16_is_not_for_onnx(tmp_path: Path) -> None:
    ee = exitkit.attach(TinyNet().eval(), images(), every=2, method="sdn").bfloat16()
    with pytest.raises(ExitkitError, match=r"does not run bfloat16.*float32"):
        exitkit.export(ee, tmp_path / "model.onnx.zip", 0.5)
    exitkit.export(ee, tmp_path / "model.pt2", 0.5)
    assert exitkit.load(tmp_path / "model.pt2")(images(3).bfloat16()).logits.dtype == torch.bfloat16


def test_batchnorm_is_folded_into_the_convolutions_of_a_compiled_step(tmp_path: Path) -> None:
    ee = exitkit.attach(exitkit.models.cifar_resnet(8).eval(), torch.zeros(2, 3, 32, 32), at_cost=[0.5]).eval()
    exported = next(export_steps(program_of(ee, ee.policy_for(0.5)), example_of(ee), channels_last=True))
    assert any("running_var" in name for name in exported.state_dict)
    compile_step(exported, tmp_path / "step.pt2")
    constants = torch._inductor.aoti_load_package(str(tmp_path / "step.pt2")).get_constant_fqns()
    assert constants
    assert not any("running_var" in name for name in constants)
