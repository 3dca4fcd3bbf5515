"""Outputs, runs, data and recipes from others: damage, lies and bombs end in one clear error, and text stays text."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import exitkit
from exitkit import ExitOutputs
from exitkit.common.errors import ArgumentError, ExitkitError, FileError
from exitkit.evaluation import RegressionOutputs
from tests.toy import TinyNet, images, noisy


def outputs(samples: int = 60) -> ExitOutputs:
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(samples, 3, 4, generator=generator).log_softmax(-1)
    labels = torch.randint(4, (samples,), generator=generator)
    hashes = torch.arange(samples)
    return ExitOutputs(
        log_probs, labels, torch.tensor([1.0, 2.0, 4.0]), 4.0, hashes=hashes, temperatures=(1.0, 2.0, 1.0)
    )


def resaved(path: Path, change: Callable[[dict[str, Any], dict[str, str]], Any]) -> Path:
    """The file with other tensors or settings, its digest left as it is."""
    with safe_open(str(path), framework="pt") as file:
        header, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, header)
    save_file(tensors, path, metadata=header)
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, header: tensors["log_probs"][3, 1].neg_(),
        lambda tensors, header: tensors["labels"][5].add_(1).remainder_(4),
        lambda tensors, header: tensors["macs"][2].mul_(2),
        lambda tensors, header: tensors["hashes"][0].add_(1),
        lambda tensors, header: tensors.pop("labels"),
        lambda tensors, header: header.update(backbone_macs="8.0"),
        lambda tensors, header: header.update(temperatures="[1.0, 1.0, 1.0]"),
        lambda tensors, header: header.pop("temperatures"),
        lambda tensors, header: header.pop("sha256"),
        lambda tensors, header: header.update(sha256="0" * 64),
    ],
)
def test_damaged_outputs_are_refused(tmp_path: Path, change: Callable[..., Any]) -> None:
    path = tmp_path / "outputs.safetensors"
    outputs().save(path)
    with pytest.raises(FileError, match="is damaged"):
        ExitOutputs.load(resaved(path, change))


@pytest.mark.parametrize("half", [False, True])
def test_outputs_come_back_as_they_were(tmp_path: Path, half: bool) -> None:
    saved = outputs()
    saved.save(tmp_path / "outputs.safetensors", half=half)
    loaded = ExitOutputs.load(tmp_path / "outputs.safetensors")
    assert torch.equal(loaded.log_probs, saved.log_probs.half() if half else saved.log_probs)
    assert loaded.temperatures == saved.temperatures
    assert torch.equal(loaded.labels, saved.labels)  # type: ignore[arg-type]


def test_older_outputs_load_with_one_warning(tmp_path: Path) -> None:
    def older(tensors: dict[str, Any], header: dict[str, str]) -> None:
        header.pop("sha256")
        header.update(format="exitkit-outputs-1", times="1")

    path = tmp_path / "outputs.safetensors"
    outputs().save(path)
    resaved(path, older)
    with pytest.warns(UserWarning, match="saved before outputs had a digest") as caught:
        loaded = ExitOutputs.load(path)
    assert len(caught) == 1
    assert torch.equal(loaded.log_probs, outputs().log_probs)


@pytest.mark.parametrize(
    "header",
    [
        {"backbone_macs": "nan"},
        {"backbone_macs": "1" * 5000},
        {"backbone_macs": "-1"},
        {"temperatures": "[" * 100_000},
        {"temperatures": '"1, 1, 1"'},
        {"temperatures": "[0.0, 1.0, 1.0]"},
        {"timings": "[{}]"},
        {"timings": '[{"device": 1, "hardware": "x", "batch": 1, "milliseconds": [1, 2, 3]}]'},
        {"timings": '[{"device": "cpu", "hardware": "x", "batch": true, "milliseconds": [1, 2, 3]}]'},
        {"criterion": "two words"},
        {"unknown": "1"},
    ],
)
def test_lies_in_the_settings_of_older_outputs(tmp_path: Path, header: dict[str, str]) -> None:
    def older(tensors: dict[str, Any], found: dict[str, str]) -> None:
        found.pop("sha256")
        found.update(format="exitkit-outputs-1", **header)

    path = tmp_path / "outputs.safetensors"
    outputs().save(path)
    resaved(path, older)
    with pytest.warns(UserWarning, match="digest"), pytest.raises(FileError):
        ExitOutputs.load(path)


def test_regression_outputs_have_a_digest_too(tmp_path: Path) -> None:
    path = tmp_path / "outputs.safetensors"
    predictions = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    RegressionOutputs(predictions, torch.arange(20.0), torch.tensor([1.0, 2.0]), 2.0).save(path)
    assert torch.equal(RegressionOutputs.load(path).predictions, predictions)
    with pytest.raises(FileError, match="is damaged"):
        RegressionOutputs.load(resaved(path, lambda tensors, header: tensors["log_probs"][0, 0].neg_()))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory with every file that a run can have."""
    from exitkit.report import calibrated, write_thresholds

    result = outputs(200)
    result.save(tmp_path / "outputs-ztw.safetensors")
    stage = {
        "exit": "a",
        "macs": 1.0,
        "head_macs": 0.1,
        "milliseconds": None,
        "head_milliseconds": None,
        "batch": None,
    }
    document = {"about": {"model": "m"}, "methods": {"ztw": {"criterion": "confidence", "stages": [stage] * 3}}}
    (tmp_path / "results.json").write_text(json.dumps(document))
    sample = {"row": 0, "image": None, "text": "a text"}
    (tmp_path / "samples.json").write_text(json.dumps({"classes": ["a", "b", "c", "d"], "samples": [sample]}))
    chosen = calibrated(result, None, 0.5, 0, max_drop=0.3, confidence=0.9)
    write_thresholds(tmp_path, {"ztw": chosen})
    return tmp_path


RUN_LIES: list[tuple[str, Callable[[Any], Any]]] = [
    ("results.json", lambda d: d["methods"]["ztw"]["stages"][0].update(macs="1")),
    ("results.json", lambda d: d["methods"]["ztw"]["stages"][0].update(macs=-1)),
    ("results.json", lambda d: d["methods"]["ztw"]["stages"][0].update(batch=10**400)),
    ("results.json", lambda d: d["methods"]["ztw"]["stages"][0].pop("exit")),
    ("results.json", lambda d: d["methods"].update(ztw=3)),
    ("results.json", lambda d: d.update(about=[])),
    ("thresholds.json", lambda d: d["ztw"]["chosen"].update(thresholds=[float("nan"), 1.0])),
    ("thresholds.json", lambda d: d["ztw"]["chosen"].update(thresholds="0.5")),
    ("thresholds.json", lambda d: d["ztw"]["chosen"].update(criterion="two words")),
    ("thresholds.json", lambda d: d["ztw"]["chosen"]["guarantee"].update(found="false")),
    ("thresholds.json", lambda d: d["ztw"]["chosen"]["guarantee"].update(samples=1.5)),
    ("thresholds.json", lambda d: d["ztw"]["chosen"].pop("temperatures")),
    ("thresholds.json", lambda d: d["ztw"]["check"].update(risk="0")),
    ("thresholds.json", lambda d: d["ztw"].pop("check")),
    ("thresholds.json", lambda d: d.update(ztw=[])),
    ("samples.json", lambda d: d["samples"][0].update(row=-1)),
    ("samples.json", lambda d: d["samples"][0].update(row=True)),
    ("samples.json", lambda d: d["samples"][0].update(image='data:image/webp;base64,"><script>')),
    ("samples.json", lambda d: d["samples"][0].update(image="https://example.org/x.png")),
    ("samples.json", lambda d: d["samples"][0].update(text="\ud800")),
    ("samples.json", lambda d: d.update(classes="abcd")),
    ("samples.json", lambda d: d.pop("classes")),
]


@pytest.mark.parametrize(("name", "lie"), RUN_LIES)
def test_lies_in_a_run(run: Path, name: str, lie: Callable[[Any], Any]) -> None:
    exitkit.report.read_run(run)
    document = json.loads((run / name).read_text())
    lie(document)
    (run / name).write_text(json.dumps(document))
    with pytest.raises(FileError, match=name.replace(".", r"\.")):
        exitkit.report.read_run(run)


@pytest.mark.parametrize("name", ["results.json", "thresholds.json", "samples.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, "", "3", '{"a": 1' + "0" * 5000 + "}", "\x00", "NaN"])
def test_files_of_a_run_that_are_none(run: Path, name: str, text: str) -> None:
    (run / name).write_text(text)
    with pytest.raises(FileError, match=name.replace(".", r"\.")):
        exitkit.report.read_run(run)


def test_names_are_text_to_the_terminal_the_spreadsheet_and_the_page(run: Path) -> None:
    name = "=[red]2+2:smile:"
    (run / "outputs-ztw.safetensors").rename(run / f"outputs-{name}.safetensors")
    (run / "results.json").unlink()
    exitkit.report.write_report([run])
    with (run / "report-curve.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert {row[0] for row in rows[1:]} == {f"'{name}"}
    assert all(not cell.startswith(("=", "+", "@")) for row in rows for cell in row)
    assert any(float(row[1]) < 1 for row in rows[1:])  # numbers stay numbers
    done = subprocess.run(
        [sys.executable, "-m", "exitkit", "calibrate", str(run), "--max-drop", "0.3"], capture_output=True, text=True
    )
    assert name in done.stdout, done.stderr


def test_the_page_allows_its_own_script_alone(run: Path) -> None:
    import base64
    import hashlib
    import re

    page = exitkit.report.write_report([run]).read_text("utf-8")
    policy = re.search(r'content="(default-src[^"]*)"', page)
    assert policy is not None
    allowed = re.search(r"script-src ([^;]*)", policy[1])
    assert allowed is not None
    script = page[page.rindex("<script>") + len("<script>") : page.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert allowed[1].strip() == f"'sha256-{digest}'"


def _png(path: Path, side: int) -> Path:
    """A black square of one bit a pixel, compressed: few bytes, many pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package for images of 8 × 8."""
    from exitkit.multi_exit.preprocessing import ImagePreprocessing

    torch.manual_seed(0)
    ee = noisy(exitkit.attach(TinyNet().eval(), images(), every=2, method="sdn"))
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    exitkit.export(ee, path, 0.5, preprocessing=ImagePreprocessing((1, 8, 8), (0.5,), (0.5,)))
    return path


def _command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "exitkit", *map(str, arguments)], capture_output=True, text=True
    )


def test_a_bad_image_is_named_and_skipped(grey: Path, tmp_path: Path) -> None:
    _png(tmp_path / "a.png", 16)
    bomb = _png(tmp_path / "b.png", 20_000)
    assert bomb.stat().st_size < 2**20
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    _png(tmp_path / "d.png", 8)
    done = _command("run", grey, tmp_path, "--trust")
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert [Path(json.loads(line)["input"]).name for line in done.stdout.splitlines()] == ["a.png", "d.png"]
    assert "2 images skipped" in done.stderr
    assert "b.png" in done.stderr
    assert "c.png" in done.stderr


def test_a_folder_with_a_bad_image_is_refused_in_words(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    from exitkit.multi_exit.image_files import opened_image

    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(FileError, match=r"x\.png' cannot be read as an image"):
        opened_image(str(tmp_path / "x.png"))


def test_an_npz_bomb(tmp_path: Path) -> None:
    from exitkit.cli.data.loading import load_data

    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w") as file,
    ):
        for _ in range(20):
            file.write(bytes(64 * 2**20))
    with pytest.raises(FileError, match="GiB, over 200 times its size"):
        load_data(str(tmp_path / "bomb.npz"), TinyNet())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a text", "1" * 5000)], "has 5000 digits"),
        ([("a text", "nan")], "not a finite number"),
        ([("a text", "1e999")], "not a finite number"),
    ],
)
def test_labels_of_any_kind(tmp_path: Path, rows: list[tuple[str, str]], message: str) -> None:
    from exitkit.cli.data.text_files import _label_indices, _numbers

    found = {label for _, label in rows}
    with pytest.raises(ArgumentError, match=message):
        _label_indices(found, "--data x.csv", False) if "digits" in message else _numbers(found)


def test_sources_of_any_length() -> None:
    from exitkit.cli.data.loading import load_data
    from exitkit.cli.latency import batch_sizes
    from exitkit.cli.sources import load_model

    for call in (
        lambda: load_data("x" * 300, TinyNet()),
        lambda: load_data("x" * 5000, TinyNet()),
        lambda: load_model("tests.toy:net", "x" * 300),
        lambda: load_model("hf:" + "x/" * 300),
        lambda: exitkit.MultiExitModel.from_pretrained(TinyNet(), "x" * 300),
        lambda: exitkit.MultiExitModel.from_pretrained(TinyNet(), "x/" * 300),
        lambda: batch_sizes("9" * 5000),
    ):
        with pytest.raises(ExitkitError):
            call()


@pytest.mark.parametrize(
    "source", ["./exits", "../exits", "/nowhere/exits", "~/exits", "runs/exits", "a/b/c", "exits/"]
)
def test_a_mistyped_path_never_leaves_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    asked: list[Any] = []
    for place in (huggingface_hub, exitkit.multi_exit.saving.hub):
        monkeypatch.setattr(place, "snapshot_download", lambda *args, **_: asked.append(args), raising=False)
    with pytest.raises(ArgumentError, match="looks like a path"):
        exitkit.MultiExitModel.from_pretrained(TinyNet(), source)
    assert asked == []


RECIPE = 'model = "tests.toy:net"\ndata = "{data}"\n[exits]\nevery = 2\nmethod = "sdn"\n[trainer]\nepochs = 1\n'


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    np.savez(tmp_path / "d.npz", images=np.zeros((20, 8, 8), np.uint8), labels=np.arange(20) % 3)
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(data=tmp_path / "d.npz"))
    return path


def test_a_recipe_that_calls_a_function_needs_trust(recipe: Path, tmp_path: Path) -> None:
    refused = _command("train", recipe, "--out", tmp_path / "out")
    assert refused.returncode == 2
    assert "the recipe's model is the function 'tests.toy:net'; --trust lets it run" in refused.stderr
    assert _command("train", recipe, "--out", tmp_path / "out", "--trust").returncode == 0
    own = _command("train", recipe, "--out", tmp_path / "own", "--model", "tests.toy:net")  # said by the user
    assert own.returncode == 0, own.stderr


@pytest.mark.parametrize("place", ["../elsewhere", "/tmp/elsewhere-of-a-recipe", "a/../../b"])
def test_a_recipe_writes_below_out_alone(recipe: Path, tmp_path: Path, place: str) -> None:
    with recipe.open("a") as file:
        file.write(f'output_dir = "{place}"\n')
    refused = _command("train", recipe, "--out", tmp_path / "out", "--trust")
    assert refused.returncode == 2
    assert "is outside of --out" in refused.stderr


def test_a_recipes_output_dir_is_below_out(recipe: Path, tmp_path: Path) -> None:
    with recipe.open("a") as file:
        file.write('output_dir = "run"\n')
    done = _command("train", recipe, "--out", tmp_path / "out", "--trust")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 100_000, "a = " + "1" * 5000, "epochs = 0x" + "f" * 5000, "\x00", "a = '\ud800'"]
)
def test_recipes_that_are_none(tmp_path: Path, text: str) -> None:
    from exitkit.cli.recipes.recipe import read_recipe

    path = tmp_path / "recipe.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ExitkitError):
        read_recipe(path, {})
    path.write_text(RECIPE.format(data="d.npz") + "seed = 0x" + "f" * 5000)
    with pytest.raises(ExitkitError):
        read_recipe(path, {"batch_size": 0})


def test_an_npz_whose_images_would_not_fit_where_they_were_enlarged(tmp_path: Path) -> None:
    """As floats of the size that the model takes these would be 61 GB."""
    from exitkit.cli.data.loading import load_data
    from exitkit.cli.sources import load_model

    count = 200_000
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "many.npz", images=images, labels=np.arange(count) % 1000)
    split = load_data(str(tmp_path / "many.npz"), load_model("timm:test_vit"))
    image, label = split.test[0]
    side = image.shape[-1]
    row = split.test.indices[0]  # type: ignore[attr-defined]
    pixels = torch.from_numpy(images[row]).permute(2, 0, 1)[None].float() / 255
    expected = torch.nn.functional.interpolate(pixels, (side, side), mode="bilinear", antialias=True)[0]
    mean, std = split.preprocessing.mean, split.preprocessing.std  # type: ignore[union-attr]
    assert label == row % 1000
    assert torch.allclose(image, (expected - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])
