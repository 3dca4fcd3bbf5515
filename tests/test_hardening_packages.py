"""Packages from others: what a file may hold follows from its ending, and nothing in it is believed unchecked."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import exitkit
from exitkit.common.errors import ArgumentError, FileError
from exitkit.multi_exit.preprocessing import ImagePreprocessing
from tests.toy import TinyNet, images, noisy

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model as each kind of package, by ending."""
    torch.manual_seed(0)
    ee = noisy(exitkit.attach(TinyNet().eval(), images(), every=2, method="sdn"))
    folder = tmp_path_factory.mktemp("packages")
    paths = {ending: folder / f"model{ending}" for ending in (".pt2", ".onnx", ".onnx.zip")}
    for path in paths.values():
        exitkit.export(
            ee, path, 0.5, labels=["cat", "dog", "owl"], preprocessing=ImagePreprocessing((1, 8, 8), (0.5,), (0.5,))
        )
    return paths


def edited(source: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a package with another manifest, whose digest is right: a lie, not an accident."""
    with zipfile.ZipFile(source) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(contents["manifest.json"])
    change(manifest)
    contents["manifest.json"] = json.dumps(manifest).encode()
    contents["manifest.sha256"] = hashlib.sha256(contents["manifest.json"]).hexdigest().encode()
    return written(target, contents)


def written(target: Path, contents: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return target


def contents_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("kind", ["torch", "compiled"])
def test_an_onnx_zip_never_runs_torch_or_native_code(
    packages: dict[str, Path], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(torch.export, "load", lambda *_: ran.append("torch.export.load"))
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *_: ran.append("aoti_load_package"))

    def claim(manifest: dict[str, Any]) -> None:
        manifest["kind"] = kind
        for step in manifest["steps"]:
            step["channels_last"] = [False] * len(step["inputs"])

    path = edited(packages[".onnx.zip"], tmp_path / "model.onnx.zip", claim)
    with pytest.raises(FileError, match=r"ends in \.onnx\.zip, but says that it holds"):
        exitkit.load(path)
    assert ran == []


def test_a_file_of_another_ending_is_not_opened(packages: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(packages[".pt2"].read_bytes())
    with pytest.raises(ArgumentError, match=r"must end in \.pt2, \.onnx, \.onnx\.zip or \.pte"):
        exitkit.load(tmp_path / "model.zip")


def test_the_first_pt2_warns_once_unless_it_is_trusted(packages: dict[str, Path]) -> None:
    code = (
        "import sys, warnings, exitkit\n"
        "path = sys.argv[1]\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    exitkit.load(path, trust=True); trusted = len([w for w in caught if 'holds code' in str(w.message)])\n"
        "    exitkit.load(path); exitkit.load(path)\n"
        "print(trusted, *[str(w.message).count('\\n') for w in caught if 'holds code' in str(w.message)])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(packages[".pt2"])], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", "1"]  # nothing where it was trusted; then one warning of two lines


def test_the_warning_says_how_to_trust_a_file_in_python_and_on_the_command_line(
    packages: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exitkit.packages.loading._warned", set())
    with pytest.warns(UserWarning, match=r"exitkit\.load\(path, trust=True\), or --trust on the command line"):
        exitkit.load(packages[".pt2"])


@pytest.mark.parametrize("ending", [".onnx", ".onnx.zip"])
def test_onnx_needs_no_trust(packages: dict[str, Path], ending: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exitkit.load(packages[ending])


def _initializer(model: Any) -> Any:
    return model.graph.initializer[0]


def _constant(model: Any) -> Any:
    attribute = onnx.helper.make_attribute("value", onnx.helper.make_tensor("c", 1, [1], [0.0]))
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["unused"]))
    model.graph.node[-1].attribute.append(attribute)
    return model.graph.node[-1].attribute[0].t


def _in_a_branch(model: Any) -> Any:
    graph = onnx.helper.make_graph([], "g", [], [], [onnx.helper.make_tensor("b", 1, [1], [0.0])])
    node = onnx.helper.make_node("If", ["condition"], ["unused"])
    node.attribute.append(onnx.helper.make_attribute("then_branch", graph))
    model.graph.node.append(node)
    return model.graph.node[-1].attribute[0].g.initializer[0]


def _in_a_function(model: Any) -> Any:
    function = onnx.helper.make_function("own", "F", [], ["y"], [onnx.helper.make_node("Constant", [], ["y"])], [])
    function.node[0].attribute.append(onnx.helper.make_attribute("value", onnx.helper.make_tensor("c", 1, [1], [0.0])))
    model.functions.append(function)
    return model.functions[-1].node[0].attribute[0].t


def _sparse(model: Any) -> Any:
    values, indices = onnx.helper.make_tensor("s", 1, [1], [1.0]), onnx.helper.make_tensor("i", 7, [1], [0])
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [4]))
    return model.graph.sparse_initializer[0].indices


@pytest.mark.parametrize("place", [_initializer, _constant, _in_a_branch, _in_a_function, _sparse])
@pytest.mark.parametrize("ending", [".onnx", ".onnx.zip"])
def test_no_other_file_is_read(
    packages: dict[str, Path],
    tmp_path: Path,
    ending: str,
    place: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """onnxruntime reads external data from wherever the graph says, and its bytes come back as logits."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_bytes(b"password" * 1000)
    contents = contents_of(packages[ending]) if ending == ".onnx.zip" else {"steps/0": packages[ending].read_bytes()}
    model = onnx.load_from_string(contents["steps/0"])
    tensor = place(model)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "secret.txt"), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    content = model.SerializeToString()
    path = tmp_path / f"model{ending}"
    if ending == ".onnx":
        path.write_bytes(content)
    else:
        manifest = json.loads(contents["manifest.json"])
        manifest["steps"][0]["sha256"] = hashlib.sha256(content).hexdigest()
        written(tmp_path / "packed", {**contents, "steps/0": content})
        edited(tmp_path / "packed", path, lambda found: found.update(steps=manifest["steps"]))
    opened: list[Any] = []
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **_: opened.append(args))
    with pytest.raises(FileError, match=r"lies in another file, 'secret\.txt', which is not read"):
        exitkit.load(path)
    assert opened == []  # refused before onnxruntime saw it


def test_thresholds_beside_a_graph_are_those_in_it(packages: dict[str, Path], tmp_path: Path) -> None:
    """The thresholds are fixed in the graph; what its metadata says of them is bound to it."""
    model = onnx.load(packages[".onnx"])
    entry = next(entry for entry in model.metadata_props if entry.key == "exitkit")
    manifest = json.loads(entry.value)
    assert manifest["policy"]["thresholds"] == [0.5]
    manifest["policy"]["thresholds"] = [0.99]
    entry.value = json.dumps(manifest)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(FileError, match="changed after its export"):
        exitkit.load(tmp_path / "model.onnx")


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "steps": lambda m: m.update(steps=[]),
    "a step less": lambda m: m["steps"].pop(),
    "exits of steps": lambda m: m["steps"][0].update(exit=1),
    "undecided": lambda m: m["steps"][0].update(decides=False),
    "decides as text": lambda m: m["steps"][0].update(decides="false"),
    "steps read": lambda m: m["steps"][1].update(inputs=["nowhere"]),
    "steps hand on": lambda m: m["steps"][0].update(live=["nowhere"]),
    "more results": lambda m: m["steps"][0]["outputs"].append("more"),
    "classes": lambda m: m.update(num_classes=7, labels=None),
    "huge classes": lambda m: m.update(num_classes=10**12, labels=None),
    "NaN threshold": lambda m: m["policy"].update(thresholds=[float("nan")]),
    "text threshold": lambda m: m["policy"].update(thresholds=["0.5"]),
    "huge threshold": lambda m: m["policy"].update(thresholds=[10**400]),
    "more thresholds": lambda m: m["policy"].update(thresholds=[0.5, 0.5]),
    "no thresholds": lambda m: m["policy"].update(thresholds=[]),
    "criterion": lambda m: m["policy"].update(criterion="two words"),
    "criterion as number": lambda m: m["policy"].update(criterion=3),
    "criterion of many digits": lambda m: m["policy"].update(criterion="tolerance-" + "9" * 5000),
    "temperatures": lambda m: m["policy"].update(temperatures=[-1.0, 1.0]),
    "policy dtype": lambda m: m["policy"].update(dtype="float99"),
    "guarantee": lambda m: m["policy"].update(guarantee={"words": "always right"}),
    "dtype": lambda m: m.update(dtype="load"),
    "input dtype": lambda m: m["inputs"][0].update(dtype="nn"),
    "huge input": lambda m: m["inputs"][0].update(sizes=[None, 3, 20_000, 20_000]),
    "negative size": lambda m: m["inputs"][0].update(sizes=[None, 1, -8, 8]),
    "no inputs": lambda m: m.update(inputs=[]),
    "input key": lambda m: m["inputs"][0].update(key=5),
    "missing": lambda m: m.pop("policy"),
    "missing inside": lambda m: m["policy"].pop("temperatures"),
    "unknown": lambda m: m.update(run="rm"),
    "labels": lambda m: m.update(labels=["cat"]),
    "label as number": lambda m: m.update(labels=["cat", "dog", 3]),
    "half a character": lambda m: m.update(labels=["cat", "dog", "\ud800"]),
    "preprocessing kind": lambda m: m["preprocessing"].update(kind="sound"),
    "huge image": lambda m: m["preprocessing"].update(size=[1, 20_000, 20_000]),
    "standard deviation": lambda m: m["preprocessing"].update(std=[0.0]),
    "means": lambda m: m["preprocessing"].update(mean=[0.5, 0.5]),
    "versions": lambda m: m.update(versions=3),
    "axes": lambda m: m.update(axes=dict.fromkeys(m["axes"], 99)),
    "exits": lambda m: m.update(exits=[["a", "b"], ["c", "d"]]),
    "format": lambda m: m.update(format="exitkit-package-2"),
    "longest of images": lambda m: m.update(longest=9),
    "format as list": lambda m: m.update(format=["exitkit-package-3"]),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_in_a_manifest(packages: dict[str, Path], tmp_path: Path, lie: str) -> None:
    for ending in (".onnx.zip", ".pt2"):
        path = edited(packages[ending], tmp_path / f"model{ending}", LIES[lie])
        with pytest.raises(FileError):
            exitkit.load(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "", "null", "3", '{"format": NaN}', '"\\ud800"'])
def test_manifests_that_are_none(packages: dict[str, Path], tmp_path: Path, text: str) -> None:
    contents = contents_of(packages[".onnx.zip"])
    contents["manifest.json"] = text.encode()
    contents["manifest.sha256"] = hashlib.sha256(text.encode()).hexdigest().encode()
    with pytest.raises(FileError):
        exitkit.load(written(tmp_path / "model.onnx.zip", contents))
    model = onnx.load(packages[".onnx"])
    next(entry for entry in model.metadata_props if entry.key == "exitkit").value = text
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(FileError):
        exitkit.load(tmp_path / "model.onnx")


def test_steps_that_are_exchanged(packages: dict[str, Path], tmp_path: Path) -> None:
    contents = contents_of(packages[".onnx.zip"])
    contents["steps/0"], contents["steps/1"] = contents["steps/1"], contents["steps/0"]
    with pytest.raises(FileError, match="step 0 was changed"):
        exitkit.load(written(tmp_path / "model.onnx.zip", contents))


def test_a_manifest_that_was_changed(packages: dict[str, Path], tmp_path: Path) -> None:
    """Zip's own checksums are written anew by whatever writes the zip anew."""
    contents = contents_of(packages[".onnx.zip"])
    contents["manifest.json"] = contents["manifest.json"].replace(b"0.5", b"0.6")
    with pytest.raises(FileError, match="manifest was changed"):
        exitkit.load(written(tmp_path / "model.onnx.zip", contents))


def test_a_zip_bomb_is_not_inflated(packages: dict[str, Path], tmp_path: Path) -> None:
    contents = contents_of(packages[".onnx.zip"])
    contents["steps/0"] = bytes(50 * 2**20)
    path = written(tmp_path / "model.onnx.zip", contents, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    with pytest.raises(FileError, match="compressed parts, which exitkit never writes"):
        exitkit.load(path)


def test_a_source_of_any_length() -> None:
    for ending in (".pt2", ".onnx"):
        with pytest.raises(ArgumentError, match="does not exist"):
            exitkit.load("x" * 5000 + ending)
    with pytest.raises(ArgumentError, match="does not exist"):
        exitkit.load("a\0b.pt2")


def test_a_step_that_loses_samples_is_an_error() -> None:
    """Before, what was not answered was uninitialised memory."""
    ee = exitkit.attach(TinyNet().eval(), images(), every=2, method="sdn")
    engine = exitkit.compile(ee, 0.5)
    with pytest.raises(FileError, match="lost samples"):
        engine.loop.in_order([], 3)


@pytest.mark.parametrize("name", ["none.pt2", "none.pte", "none.onnx"])
def test_a_file_that_is_not_there_is_not_warned_of(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exitkit.packages.loading._warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ArgumentError, match="does not exist"):
            exitkit.load(tmp_path / name)
    assert not caught
