"""The examples run from end to end on tiny made-up data, and say plainly what is missing."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import exitkit

ROOT = Path(__file__).resolve().parents[1]


def example(name: str, folder: str = "examples") -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", ROOT / folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Grey images as MedMNIST has them: bright ones are of class 1."""
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, count in (("train", 64), ("test", 32)):
        labels = np.arange(count) % 2
        noise = generator.integers(0, 100, (count, 28, 28))
        arrays |= {
            f"{part}_images": (noise + 120 * labels[:, None, None]).astype(np.uint8),
            f"{part}_labels": labels[:, None],
        }
    np.savez(tmp_path / "images.npz", **arrays)
    return tmp_path / "images.npz"


def test_oct2017_learns_other_classes(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = "exitkit.models:cifar_resnet"
    options = ["--weights", "random", "--every", "4", "--head", "1L", "--epochs", "2", "--test-images", "20"]
    example("oct2017").main(["--data", str(images), "--model", model, *options, "--out", str(tmp_path / "exits")])
    shown = capsys.readouterr().out
    assert "2 classes, 2 exits" in shown
    assert "20 test images" in shown
    assert "Max (no limit)" in shown
    exits = exitkit.MultiExitModel.from_pretrained(_same_backbone(), tmp_path / "exits")
    assert exits.num_classes == 2


def _same_backbone() -> torch.nn.Module:
    from exitkit.cli.sources import load_model

    return load_model("exitkit.models:cifar_resnet")


def test_test_images_are_spread_over_the_classes() -> None:
    rows = torch.arange(100)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), 10)
    kept = torch.cat([batch for (batch,) in example("oct2017").first(loader, 5)])
    assert kept.tolist() == [0, 24, 49, 74, 99]


def test_oct2017_refuses_no_classes(images: Path) -> None:
    options = ["--model", "exitkit.models:cifar_resnet", "--weights", "random", "--classes", "0"]
    with pytest.raises(exitkit.ExitkitError, match="num_classes=0 must be a whole number at least 2"):
        example("oct2017").main(["--data", str(images), *options])


def test_oct2017_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(exitkit.ExitkitError, match="does not exist"):
        example("oct2017").main(
            ["--data", str(tmp_path / "no.npz"), "--model", "exitkit.models:cifar_resnet", "--weights", "random"]
        )


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Texts of two classes that a single word tells apart."""
    words, chance = ["so", "it", "was", "that", "film"], random.Random(0)
    lines = [f"{' '.join(chance.choices(words, k=5))} {('bad', 'good')[i % 2]}\t{i % 2}" for i in range(400)]
    path = tmp_path / "texts.tsv"
    path.write_text("\n".join(["text\tlabel", *lines]) + "\n", encoding="utf-8")
    return path


def test_bert_text_promises_and_stops(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="needs transformers: pip install 'exitkit[transformers]'")
    sizes = ["--layers", "2", "--width", "16", "--vocabulary", "60", "--pretraining-epochs", "2", "--epochs", "1"]
    example("bert_text").main(["--train", str(texts), "--test", str(texts), *sizes, "--max-drop", "0.1"])
    shown = capsys.readouterr().out
    assert "320 texts to learn from, 80 to choose τ on, 400 to test on" in shown
    assert "As attached" in shown
    assert "at most 0.1" in shown or "No sample leaves" in shown


@pytest.mark.parametrize(
    ("name", "module", "extra", "given"),
    [
        ("bert_text", "transformers", "transformers", ["--train", "a.tsv", "--test", "b.tsv"]),
        ("policy_exits", "gymnasium", "rl", ["--policy", "a.zip"]),
    ],
)
def test_an_example_names_the_extra_that_it_needs(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, extra: str, given: list[str]
) -> None:
    if name == "policy_exits":
        pytest.importorskip("gymnasium")  # exitkit.rl itself is of the extra
    program = example(name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(exitkit.ExitkitError, match=rf"pip install 'exitkit\[{extra}\]'"):
        program.main(given)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--env", "NoSuchGame-v0"], "--env 'NoSuchGame-v0' cannot be made: .*NoSuchGame.* doesn't exist"),
        (["--env", "CartPole-v99"], "--env 'CartPole-v99' cannot be made: .*v99"),
        (["--envs", "0"], "--envs 0 must be at least 1"),
    ],
)
def test_policy_exits_says_what_no_environment_can_be_made_of(options: list[str], said: str) -> None:
    pytest.importorskip("gymnasium")
    with pytest.raises(exitkit.ExitkitError, match=said):
        example("policy_exits").main(["--policy", "a.zip", *options])


def test_bert_text_reads_as_many_texts_as_asked_for(texts: Path) -> None:
    read, labels = example("bert_text").read(texts, 7)
    assert len(read) == len(labels) == 7


@pytest.mark.parametrize("content", ["text\tlabel\n", "text\tlabel\nno label\n", "text\tlabel\nbad\tnegative\n"])
def test_bert_text_refuses_other_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.tsv").write_text(content, encoding="utf-8")
    with pytest.raises(exitkit.ExitkitError, match=r"bad\.tsv.*text, tab, label"):
        example("bert_text").read(tmp_path / "bad.tsv", 10)


def test_label_free_never_reads_training_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (128, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "cifar10_train.npz", images=pictures[:64])  # no labels there
    np.savez(tmp_path / "cifar10_test.npz", images=pictures, labels=np.zeros(128, np.int64))
    save_file(exitkit.models.cifar_resnet(14).state_dict(), tmp_path / "weights.safetensors")
    arguments = ["--data", str(tmp_path), "--weights", str(tmp_path / "weights.safetensors"), "--depth", "14"]
    example("label_free").main([*arguments, "--epochs", "1", "--head", "1L", "--max-drop", "0.2"])
    shown = capsys.readouterr().out
    assert "64 new images" in shown
    assert "Answers other than the whole network's" in shown


def test_label_free_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(exitkit.ExitkitError, match=r"cifar10_train\.npz.*does not exist"):
        example("label_free").main(["--data", str(tmp_path), "--weights", str(tmp_path / "w.safetensors")])


@pytest.mark.parametrize(("first", "shown"), [(0.2, 75.0), (0.2499, 50.0), (0.25, None), (0.2549, None)])
def test_a_benchmarks_table_has_what_stays_below_the_budget(first: float, shown: float | None) -> None:
    """A first exit of exactly the budget does not, as in the library."""
    p = torch.tensor([[0.4, 0.9], [0.9, 0.9], [0.7, 0.9], [0.2, 0.9]])
    log_probs = torch.stack([p, 1 - p], -1).log()
    outputs = exitkit.ExitOutputs(log_probs, torch.zeros(4).long(), [first * 1e6, 0.3e6], 1e6)
    tables = example("tables", "benchmarks")
    assert tables.at(outputs, 0.25) == shown
    assert tables.at(outputs, 0.5) == 100.0
    assert tables.cell([tables.at(outputs, 0.25)]) == ("-" if shown is None else f"{shown:.1f}")


def test_a_benchmarks_deviation_divides_by_one_less_than_the_runs() -> None:
    tables = example("tables", "benchmarks")
    assert tables.cell([1.0, 2.0, 6.0]) == "3.0 ± 2.6"  # √((4 + 1 + 9) / 2) = 2.65, where √(14 / 3) = 2.16
    assert tables.cell([1.0, None]) == "-"
