"""``exitkit retrofit`` as a user types it."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import exitkit
from exitkit.cli.data.split import Split
from exitkit.cli.writing import write_class_names
from tests.test_cli import invoke, refused, run  # noqa: F401 - fixtures
from tests.toy import TinyNet

Run = Callable[..., str]
MODEL, OF_FILES = "tests.test_cli_retrofit:trained", "tests.test_cli_retrofit:of_files"


def patterns(count: int, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Grey 8×8 images whose brightest quarter is their class, of three."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, count)
    images = generator.integers(0, 120, (count, 8, 8, 1))
    for number, label in enumerate(labels):
        images[number, 4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 100
    return images.astype(np.uint8), labels


def trained() -> nn.Module:
    """A small network that tells the patterns apart."""
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(part) for part in patterns(600, 1))
    model = TinyNet()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        rows = torch.randint(len(labels), (64,))
        inputs = images[rows].permute(0, 3, 1, 2).float() / 255
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels[rows]).backward()
        optimizer.step()
    return model.eval()


def of_files() -> nn.Module:
    """The same, and it says how images of files become its inputs."""
    model = trained()
    model.pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.0,), "std": (1.0,), "crop_pct": 1.0}
    return model


def of_larger_files() -> nn.Module:
    """It asks for the middle of files' images."""
    model = of_files()
    model.pretrained_cfg |= {"mean": (0.5,), "std": (0.5,), "crop_pct": 0.5}
    return model


def of_five_classes() -> nn.Module:
    return TinyNet(5)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    images, labels = patterns(900, 2)
    more, their_labels = patterns(500, 3)
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    np.savez(tmp_path / "calibration.npz", images=more, labels=their_labels)
    return tmp_path


def test_a_model_and_data_become_exits_a_verdict_and_a_page(
    run: Run,  # noqa: F811
    data: Path,
) -> None:
    out = data / "out"
    arguments = (
        "retrofit",
        "--model",
        MODEL,
        "--data",
        data / "images.npz",
        "--calibration",
        data / "calibration.npz",
    )
    options = ("--max-drop", 0.05, "--effort", "quick", "--no-optimize", "--out", out)
    printed = run(*arguments, *options)
    found = json.loads((out / "retrofit.json").read_text())
    assert found["verdict"] in ("exits", "backbone")
    assert found["reason"] in " ".join(printed.split())
    page = (out / "report.html").read_text()
    assert found["reason"][1:] in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    model = exitkit.MultiExitModel.from_pretrained(trained(), out / "exits", torch.zeros(2, 1, 8, 8))
    assert model.policy is not None
    assert list(model.policy.thresholds) == list(found["policy"]["thresholds"])
    again = run(*arguments, *options)  # everything is there already
    assert json.loads((out / "retrofit.json").read_text())["policy"] == found["policy"]
    assert found["verdict"] in again


@pytest.mark.parametrize("model", [MODEL, "tests.test_cli_retrofit:of_larger_files"])
def test_the_commands_that_are_printed_run_as_they_stand(
    run: Run,  # noqa: F811
    data: Path,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It lacked ``--out``, and was broken into lines. Nor did the commands that export prints: a package did not know how its
    images were prepared, or prepared them otherwise than those that its promise was made on.
    """
    from PIL import Image

    ee = exitkit.attach(trained(), torch.zeros(2, 1, 8, 8), at=["blocks.0"], head="1L", method="sdn")

    class Result:
        verdict, instead, model = "exits", None, ee

        def save(self, folder: Path) -> None:
            ee.save_pretrained(folder / "exits", threshold=-1.0)

        def report(self, path: Path) -> None:
            path.write_text("")

    monkeypatch.setattr("exitkit.retrofit", lambda *_, **__: Result())
    weights, out = data / "the weights.pth", data / ("a long name, " * 9)
    torch.save(trained().state_dict(), weights)
    given = ("--model", model, "--data", data / "images.npz", "--weights", weights)
    printed = run("retrofit", *given, "--out", out).splitlines()
    command = next(line for line in printed if line.startswith("  exitkit export "))
    printed = run(*shlex.split(command)[1:]).splitlines()
    assert (out / "model.pt2").is_file()
    images = patterns(4, 5)[0]
    with torch.no_grad():  # the whole image, as the .npz holds it, normalised by 0.5
        logits, _ = ee(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).logits
    for number, image in enumerate(images):
        Image.fromarray(image[:, :, 0]).save(data / f"{number}.png")
    commands = (shlex.split(line, comments=True)[1:] for line in printed if line.startswith("  exitkit "))
    (answering, *package, _), timing = commands
    answers = run(answering, *package, "--trust", *(data / f"{number}.png" for number in range(4))).splitlines()
    expected = logits.softmax(1).max(1).values
    assert [json.loads(line)["score"] for line in answers] == pytest.approx(expected.tolist(), abs=1e-3)
    assert json.loads(run(*timing, "--trust", "--batches", "1", "--json"))[0]["samples"] > 1


def test_class_names_that_the_user_wrote_stay(tmp_path: Path) -> None:
    samples: Any = SimpleNamespace(classes=["bee", "cow"])
    split, names = Split(samples, samples), tmp_path / "classes.txt"
    write_class_names(tmp_path, split, 3)  # of another number: they are not the model's
    assert not names.exists()
    write_class_names(tmp_path, split, 2)
    assert names.read_text() == "bee\ncow\n"
    names.write_text("Biene\nKuh\n")
    write_class_names(tmp_path, split, 2)
    assert names.read_text() == "Biene\nKuh\n"


OLDER = "saves 9%; but small keeps the same promise for 5.0% of the MACs: ship that instead"


def test_a_package_of_exits_from_an_image_folder_names_its_classes(
    run: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    """It answered with numbers."""
    from PIL import Image

    for name, (images, labels) in {"train": patterns(200, 2), "more": patterns(200, 3)}.items():
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = tmp_path / name / ["bee", "cow", "dog"][label] / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[:, :, 0]).save(path)
    out = tmp_path / "out"
    heads = ("--heads", "1L", "--at", "blocks.0", "--effort", "quick", "--max-drop", "0.5", "--no-optimize")
    given = ("--model", OF_FILES, "--data", tmp_path / "train", "--calibration", tmp_path / "more")
    run("retrofit", *given, *heads, "--out", out)
    run("export", "--model", OF_FILES, "--exits", out / "exits", "--out", tmp_path / "model.pt2")
    photo = next((tmp_path / "more" / "cow").iterdir())
    assert json.loads(run("run", tmp_path / "model.pt2", "--trust", photo))["label"] == "cow"


@pytest.mark.parametrize(
    ("found", "advised"),
    [
        ({"verdict": "exits", "instead": None, "reason": "in whatever words"}, True),
        ({"verdict": "backbone", "instead": None, "reason": "they cost 9% more time"}, False),
        ({"verdict": "exits", "instead": "small", "reason": "better than to ship the exits"}, False),
        ({"verdict": "exits", "reason": OLDER}, True),  # of a version that wrote the alternative in the sentence alone
    ],
)
def test_export_says_what_the_verdict_was(run: Run, data: Path, found: dict[str, Any], advised: bool) -> None:  # noqa: F811
    """It warns where that was not to ship the exits, but to ship the model or another; in any case it gives the reason."""
    ee = exitkit.attach(trained(), torch.zeros(2, 1, 8, 8), at=["blocks.0"], head="1L", method="sdn")
    ee.save_pretrained(data / "out" / "exits", threshold=0.75)
    (data / "out" / "retrofit.json").write_text(json.dumps(found))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        told = " ".join(
            run("export", "--model", MODEL, "--exits", data / "out" / "exits", "--out", data / "model.pt2").split()
        )
    warned = [str(one.message) for one in heard if "retrofit" in str(one.message)]
    assert warned == ([] if advised else [f"exitkit retrofit advises against these exits: {found['reason']}"])
    assert (f"exits: {found['reason']}" in told) == advised
    assert "τ = 0.75" in told


def test_wrong_arguments_are_said_in_a_line_or_two(refused: Run, data: Path) -> None:  # noqa: F811
    def said(*options: object, model: str = MODEL) -> str:
        return refused("retrofit", "--model", model, "--data", data / "images.npz", "--out", data / "out", *options)

    assert "effort='hard' is unknown" in said("--effort", "hard")
    assert "--batch-size 0 must be at least 1" in said("--batch-size", 0)
    assert "max_drop=0.0 must be" in said("--max-drop", 0)
    assert "too few for max_drop=0.001" in said("--max-drop", 0.001)
    assert "no better than chance" in said("--max-drop", 0.1, model="tests.toy:net")
    assert "head='tests.nowhere:made' cannot be imported" in said("--heads", "1L,tests.nowhere:made")
    assert "head='conv': stride=0 must be" in said("--heads", "1L,conv(stride=0, width=8)", "--max-drop", 0.1)
    assert "was given twice" in said("--alternative", MODEL, "--alternative", MODEL)
    other = said("--max-drop", 0.1, model="tests.test_cli_retrofit:of_five_classes")
    assert "the data have 3 classes, but the model tells 5 apart" in other
    assert "--num-classes 5 if the labels are the model's own" in other
    np.savez(data / "wide.npz", images=np.zeros((2_000, 8, 8, 3), np.uint8), labels=np.arange(2_000) % 3)
    wide = refused("retrofit", "--model", MODEL, "--data", data / "wide.npz", "--out", data / "out")
    assert "do not run through TinyNet" in wide
    (data / "file").write_text("")
    assert "is a file" in refused("retrofit", "--model", MODEL, "--data", data, "--out", data / "file")


@pytest.mark.parametrize(("there", "command"), [("results.json", "retrofit"), ("retrofit.json", "bench")])
def test_a_run_of_another_command_is_not_written_over(refused: Run, data: Path, there: str, command: str) -> None:  # noqa: F811
    """Their exits and pages have the same names; bench removed the page and the package of retrofit."""
    (data / there).write_text("{}")
    error = refused(command, "--model", MODEL, "--data", data / "images.npz", "--out", data)
    assert f"--out '{data}' holds a run already" in error


def test_the_calibration_samples_are_named_as_they_were_given(refused: Run, data: Path, tmp_path: Path) -> None:  # noqa: F811
    np.savez(tmp_path / "foreign.npz", x=np.zeros(3))
    for path, wrong in ((tmp_path / "none.npz", "does not exist"), (tmp_path / "foreign.npz", "holds ['x']")):
        given = ("--data", data / "images.npz", "--calibration", path, "--out", data / "out")
        error = refused("retrofit", "--model", MODEL, *given)
        assert f"--calibration '{path}' {wrong}" in error
        assert "--test" not in error


def test_what_retrofit_wrote_is_no_run_and_its_page_is_named(refused: Run, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "retrofit.json").write_text("{}")
    for command in ("report", "calibrate", "compare"):
        error = refused(command, tmp_path)
        assert f"is of exitkit retrofit, whose page is {tmp_path / 'report.html'}" in error
