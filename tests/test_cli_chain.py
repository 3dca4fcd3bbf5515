"""From a data set to a package in commands that know what those before them left."""

# ruff: noqa: F811  (fixtures of tests.test_cli)

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import exitkit
from exitkit.multi_exit.preprocessing import ImagePreprocessing
from tests.test_cli import TOY, images, invoke, refused, run  # noqa: F401
from tests.toy import net

BENCH = ("--epochs", 2, "--lr", 0.01, "--methods", "sdn,pbee,ztw", "--every", 2)


@pytest.fixture
def bench(run: Any, images: Path, tmp_path: Path) -> Path:
    out = tmp_path / "run"
    run("bench", "--model", TOY, "--data", images, "--test", images, "--out", out, *BENCH)
    return out


def toy() -> torch.nn.Module:
    torch.manual_seed(0)  # as the command line does before it builds a model
    return net().eval()


def test_bench_calibrate_export_run(run: Any, bench: Path, images: Path, tmp_path: Path) -> None:
    """Nothing is typed twice: the package has the backbone, the exits, the policy, the names and the preprocessing."""
    from PIL import Image

    run("calibrate", bench, "--max-drop", 0.5)
    printed = run("export", bench, "--trust", "--labels", "dark,grey,light")
    thresholds = {name: one["chosen"] for name, one in json.loads((bench / "thresholds.json").read_text()).items()}
    cheapest = min(thresholds, key=lambda name: thresholds[name]["guarantee"]["cost"])
    assert printed.startswith(f"{cheapest}: τ = ")
    assert "the cheapest that keeps its promise" in printed.replace("\n", " ")
    assert "calibration samples" in printed
    assert f"exitkit run {bench / 'model.pt2'} INPUTS" in printed.replace("\n", "")

    pixels = np.load(images)["images"]
    for row in range(4):
        Image.fromarray(pixels[row]).save(tmp_path / f"{row}.png")
    shown = run("run", bench / "model.pt2", *(tmp_path / f"{row}.png" for row in range(4)))
    records = [json.loads(line) for line in shown.splitlines()]
    ee = exitkit.MultiExitModel.from_pretrained(toy(), bench / "exits" / cheapest, torch.zeros(2, 1, 8, 8))
    assert ee.method.name == cheapest
    assert ee.method.score.name == thresholds[cheapest]["criterion"]
    tensors = (torch.tensor(pixels[:4]).float()[:, None] / 255 - 0.5) / 0.5
    expected = exitkit.compile(ee, thresholds[cheapest]["thresholds"][0])(tensors)
    assert [record["exit"] for record in records] == expected.exit.tolist()
    names = ("dark", "grey", "light")
    assert [record["label"] for record in records] == [names[int(row.argmax())] for row in expected.logits]
    guarantee = exitkit.load(bench / "model.pt2", trust=True).policy.guarantee
    assert guarantee is not None
    assert guarantee.max_drop == 0.5


def test_methods_that_share_exits_keep_their_own_criterion(bench: Path) -> None:
    criteria = {
        name: exitkit.MultiExitModel.from_pretrained(
            toy(), bench / "exits" / name, torch.zeros(2, 1, 8, 8)
        ).method.score
        for name in ("sdn", "pbee")
    }
    assert [one.name for one in criteria.values()] == ["confidence", "patience"]
    weights = [next((bench / "exits" / name).glob("*.safetensors")).read_bytes() for name in criteria]
    assert weights[0] == weights[1]


def test_export_of_one_method_at_a_threshold_of_ones_own(run: Any, bench: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.pt2"
    run("export", bench, "--model", TOY, "--method", "sdn", "--threshold", 0.4, "--out", out)
    policy = exitkit.load(out, trust=True).policy
    assert (policy.criterion, policy.threshold, policy.guarantee) == ("confidence", 0.4, None)


def test_a_run_with_a_new_last_layer_is_exported(run: Any, images: Path, tmp_path: Path) -> None:
    """The model tells three classes apart, and is asked for five; whether the backbone learns makes no difference."""
    given = ("--data", images, "--test", images)
    run("bench", "--model", TOY, *given, "--out", tmp_path / "bench", *BENCH, "--num-classes", 5)
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        f'model = "tests.toy:TinyNet"\ndata = {json.dumps(str(images))}\n[exits]\nevery = 2\nnum_classes = 5\nmethod = "ztw"\n'
        '[trainer]\nepochs = 1\nregime = "mixed"\n'
    )
    run("train", recipe, "--trust", "--out", tmp_path / "train")
    for made in (tmp_path / "bench", tmp_path / "train"):
        run("export", made, "--method", "ztw", "--threshold", 0.3, "--trust")
        answers = exitkit.load(made / "model.pt2", trust=True)(torch.ones(2, 1, 8, 8))
        assert answers.logits.shape == (2, 5)


def test_a_run_with_a_head_of_its_own_is_exported_on_trust(
    run: Any, refused: Any, images: Path, tmp_path: Path
) -> None:
    recipe, made = tmp_path / "mine.toml", tmp_path / "made"
    recipe.write_text(
        f'model = "tests.toy:TinyNet"\ndata = {json.dumps(str(images))}\n[exits]\nevery = 2\nmethod = "sdn"\n'
        'head = "tests.test_own_heads:averaged(width=7)"\n[trainer]\nepochs = 1\n'
    )
    run("train", recipe, "--trust", "--out", made)
    typed = ("export", made, "--method", "sdn", "--threshold", 2)
    assert "the run's head is the function" in refused(*typed, "--model", "tests.toy:TinyNet")
    run(*typed, "--trust")
    assert exitkit.load(made / "model.pt2", trust=True)(torch.ones(2, 1, 8, 8)).logits.shape == (2, 3)


def test_exits_are_found_inside_a_run(run: Any, bench: Path, tmp_path: Path) -> None:
    written = []
    for place in (bench / "exits" / "ztw", bench):
        out = tmp_path / f"{place.name}.pt2"
        flags = ("--method", "ztw") if place == bench else ()
        run("export", "--model", TOY, "--exits", place, *flags, "--threshold", 0.4, "--out", out)
        written.append(exitkit.load(out, trust=True))
    assert torch.equal(*(package(torch.ones(1, 1, 8, 8)).logits for package in written))
    for package in written:  # prepared as the run's samples were
        assert package.description is not None
        prepared = package.description.preprocessing
        assert isinstance(prepared, ImagePreprocessing)
        assert (prepared.mean, prepared.std) == ((0.5,), (0.5,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "RUN"), "run exitkit calibrate RUN first, or give --method and --threshold"),
        (
            ("export", "RUN", "--method", "ztw", "--trust"),
            "no threshold that was calibrated holds a promise for 'ztw'",
        ),
        (("export", "RUN", "--method", "zwt"), "Did you mean 'ztw'"),
        (("export", "RUN", "--method", "ztw", "--threshold", 0.4), "--trust lets it run"),
        (("export", "RUN", "--method", "ztw", "--trust", "--out", "x.tflite"), "--out 'x.tflite' must end in .pt2"),
        (("export",), "export takes one place with exits: RUN_DIR"),
        (("export", "RUN", "--exits", "RUN"), "export takes one place with exits: RUN_DIR"),
        (("export", "nowhere"), "RUN_DIR 'nowhere' is not a directory"),
        (("export", "--exits", "RUN/exits/ztw", "--model", TOY), "--out is missing"),
        (("export", "--exits", "RUN/exits/ztw", "--out", "RUN/model.pt2"), "--trust lets it run"),
        (
            ("export", "--exits", "RUN/exits", "--model", TOY, "--out", "RUN/model.pt2"),
            "holds those of pbee, sdn, ztw",
        ),
        (("export", "RUN", "--method", "ztw", "--trust", "--threshold", 0.4, "--labels", "a,b"), "labels has 2 names"),
        (
            ("export", "RUN", "--method", "ztw", "--trust", "--threshold", 0.4, "--labels", "no.txt"),
            "--labels 'no.txt' is no file, and a single name",
        ),
    ],
)
def test_wrong_export(refused: Any, bench: Path, arguments: tuple[object, ...], message: str) -> None:
    error = refused(*(str(part).replace("RUN", str(bench)) for part in arguments))
    assert message.replace("RUN first", f"{bench} first") in error
    assert not (bench / "model.pt2").exists()


def test_the_demo_goes_on_as_it_says(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    printed = run("demo")
    commands = re.findall(r"^  exitkit ([^#\n]*)#", printed, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["calibrate", "report", "export"]
    for command in commands:
        run(*command.split())
    made = [
        tmp_path / "exitkit-demo" / name
        for name in ("model.pt2", "report.html", "report-curve.csv", "thresholds.json")
    ]
    assert all(path.exists() for path in made)
    assert "image" in json.dumps(
        exitkit.load("exitkit-demo/model.pt2", trust=True).description.preprocessing.size and "image"
    )
    monkeypatch.setattr("exitkit.cli.demo._train_backbone", lambda backbone, _: backbone.eval())
    monkeypatch.setattr("exitkit.training.Trainer.fit", lambda *_: None)
    run("demo")
    assert not any(path.exists() for path in made)  # they were of other exits


def test_the_cache_changes_no_result(run: Any, images: Path, tmp_path: Path) -> None:
    for name, flags in (("whole", ()), ("cached", ("--cache",))):
        out = tmp_path / name
        run(
            *("bench", "--model", TOY, "--data", images, "--out", out, "--methods", "sdn", "--epochs", 1),
            *("--at", "0,blocks.1", *flags),
        )
    whole, cached = (
        exitkit.ExitOutputs.load(tmp_path / name / "outputs-sdn.safetensors") for name in ("whole", "cached")
    )
    assert whole.log_probs.shape[1] == 3  # two exits and the backbone
    assert torch.allclose(whole.log_probs, cached.log_probs, atol=1e-5)


def test_a_device_that_is_not_here_is_refused_first(
    refused: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")  # and put back afterwards
    arguments = ("bench", "--model", TOY, "--data", images, "--out", tmp_path / "run", "--device")
    assert "--device 'gpu' cannot be used here" in refused(*arguments, "gpu")
    if not torch.cuda.is_available():
        assert "--device 'cuda' cannot be used here" in refused(*arguments, "cuda")
    assert not (tmp_path / "run").exists()


def test_a_run_is_timed_on_its_own_samples(run: Any, bench: Path, tmp_path: Path) -> None:
    """Those beside the package; named from elsewhere; and of them as many as were kept."""
    written = json.loads(run("calibrate", bench, "--max-drop", 0.5, "--json"))
    for name, one in json.loads((bench / "thresholds.json").read_text()).items():
        assert written[name]["chosen"] == one["chosen"]
    run("export", bench, "--trust")
    flags = ("--trust", "--batches", "1")
    (timed,) = json.loads(run("bench-latency", bench / "model.pt2", *flags, "--json"))
    assert (timed["batch"], timed["samples"]) == (1, 60)
    assert timed["mean_ms"] > 0
    assert timed["average_exit"] >= 0
    assert "60 different samples" in run("bench-latency", bench / "model.pt2", *flags)
    (bench / "model.pt2").rename(tmp_path / "model.pt2")
    assert "60 different samples" in run("bench-latency", tmp_path / "model.pt2", bench, *flags)


def test_only_a_librarys_model_is_said_to_have_random_weights(run: Any, images: Path, tmp_path: Path) -> None:
    """A function may load its own."""
    flags = ("--data", images, "--methods", "sdn", "--epochs", 1)
    assert "no --weights" not in run("bench", "--model", TOY, *flags, "--out", tmp_path / "run")
