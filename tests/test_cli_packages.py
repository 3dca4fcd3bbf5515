"""The command line around packages: from saved exits to answers on images and texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import exitkit
from exitkit.cli.app import app
from exitkit.cli.sources import load_model

MODEL = "timm:test_resnet"


def run(*arguments: str | Path) -> list[str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


@pytest.fixture(scope="module")
def exits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("timm")
    folder = tmp_path_factory.mktemp("exits")
    ee = exitkit.attach(load_model(MODEL).eval(), every=2, method="sdn", head="1L")
    ee.save_pretrained(folder, threshold=0.0)
    return folder


@pytest.fixture(scope="module")
def package(exits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    shown = run("export", "--model", MODEL, "--exits", exits, "--out", path)
    assert "Written to" in " ".join(shown)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    from PIL import Image

    generator = np.random.default_rng(0)
    for index in range(3):
        pixels = generator.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_images_and_folders(package: Path, pictures: Path) -> None:
    records = [json.loads(line) for line in run("run", package, pictures, pictures / "1.png", "--batch-size", "2")]
    assert [Path(record["input"]).name for record in records] == ["0.png", "1.png", "2.png", "1.png"]
    assert all(record["exit"] == 0 and 0 < record["score"] <= 1 for record in records)
    assert records[1]["label"] == records[3]["label"]
    engine = exitkit.load(package)
    assert engine.description is not None
    made: Any = engine.description.preprocessing
    from PIL import Image

    x = made([Image.open(pictures / "1.png")])
    assert records[1]["label"] == int(engine(x).logits.argmax())
    assert {json.loads(line)["exit"] for line in run("run", package, pictures, "--threshold", "2")} == {1}


def test_the_likeliest_labels(package: Path, pictures: Path) -> None:
    """With the probabilities of the exit that answered."""
    (record,) = map(json.loads, run("run", package, pictures / "1.png", "--top", "3"))
    probabilities = [one["probability"] for one in record["top"]]
    assert len(record["top"]) == 3
    assert record["top"][0]["label"] == record["label"]
    assert probabilities[0] == pytest.approx(record["score"], abs=2e-6)  # sdn's score is the confidence
    assert probabilities == sorted(probabilities, reverse=True)
    assert "top" not in json.loads(run("run", package, pictures / "1.png")[0])
    with pytest.raises(exitkit.ArgumentError, match="--top 1001 is more than the package's 1000 classes"):
        run("run", package, pictures / "1.png", "--top", "1001")


def test_times_beside_a_run_in_which_nobody_leaves(package: Path, pictures: Path) -> None:
    shown = "\n".join(run("bench-latency", package, pictures, "--batches", "1,2"))
    assert "3 different samples" in shown
    assert "no exits" in shown
    assert "µs" in shown
    assert "×" in shown


def test_noise_is_not_timed(package: Path) -> None:
    with pytest.raises(exitkit.ArgumentError, match="noise would not leave where real samples do"):
        CliRunner().invoke(app, ["bench-latency", str(package)], catch_exceptions=False)


def test_the_average_exit_is_that_of_all_samples_given(package: Path, tmp_path: Path) -> None:
    """At batch size 1 too, where a run sees one sample: τ between the samples' scores lets some leave."""
    samples = torch.randn(4, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "four.npy", samples.numpy())
    everyone = exitkit.load(package, threshold=-1.0, trust=True)
    tau = float(everyone(samples).score.double().sort().values[1:3].mean())
    expected = float(exitkit.load(package, threshold=tau, trust=True)(samples).exit.float().mean())
    assert 0 < expected < 1
    flags = ("--trust", "--threshold", str(tau), "--batches", "1,4")
    rows = [line for line in run("bench-latency", package, tmp_path / "four.npy", *flags) if "×" in line]
    assert [row.split("│")[6].strip() for row in rows] == [f"{expected:.2f}"] * 2


def test_texts(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "good", "bad", "film"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "bert"
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=5, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        id2label={0: "no", 1: "yes"}, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    exitkit.attach(model, every=1, method="sdn").save_pretrained(tmp_path / "exits", threshold=0.6)
    run("export", "--model", f"hf:{folder}", "--exits", tmp_path / "exits", "--out", tmp_path / "model.pt2")
    (tmp_path / "texts.csv").write_text("text,label\ngood film,1\nbad film film film,0\n")
    records = [json.loads(line) for line in run("run", tmp_path / "model.pt2", "good film", tmp_path / "texts.csv")]
    assert [record["input"] for record in records] == ["good film", "good film", "bad film film film"]
    (tmp_path / "quotes.tsv").write_text('text\tlabel\n" good film\t1\n"bad" film\t0\n')
    quoted = [json.loads(line)["input"] for line in run("run", tmp_path / "model.pt2", tmp_path / "quotes.tsv")]
    assert quoted == ['" good film', '"bad" film']
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfgood film\n")  # as Notepad saves UTF-8
    assert json.loads(run("run", tmp_path / "model.pt2", tmp_path / "marked.txt")[0]) == records[0]
    assert records[0] == records[1]
    for record in records:
        ids = torch.tensor([[words[word] for word in record["input"].split()]])
        ee = exitkit.MultiExitModel.from_pretrained(model, tmp_path / "exits")
        answer = exitkit.compile(ee)(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert record["label"] == ("no", "yes")[int(answer.logits.argmax())]
        assert record["exit"] == int(answer.exit)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "PACKAGE", "nowhere.png"], r"'nowhere\.png' does not exist; this package takes images"),
        (["run", "PACKAGE", "notes.txt"], r"'notes\.txt' holds texts, and this package takes images"),
        (["run", "PACKAGE", "0.png", "--batch-size", "0"], r"--batch-size 0 must be at least 1"),
        (["run", "nowhere.pt2", "0.png"], r"'nowhere\.pt2' does not exist"),
        (["bench-latency", "PACKAGE", "--batches", "1,x"], r"--batches '1,x' must be numbers"),
        (["bench-latency", "PACKAGE", "notes.npy"], r"notes\.npy' cannot be read as \.npy"),
        (["bench-latency", "PACKAGE", "notes.txt"], r"notes\.txt' holds texts, and this package takes images"),
        (["bench-latency", "PACKAGE", "no/folder"], r"'no/folder' does not exist"),
        (["run", "PACKAGE", "0.png", "--device", "gpu"], r"device='gpu' is not a device of torch"),
    ],
)
def test_wrong_input(
    package: Path, pictures: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures)
    given = [str(package) if argument == "PACKAGE" else argument for argument in arguments]
    with pytest.raises(exitkit.ExitkitError, match=message):
        CliRunner().invoke(app, given, catch_exceptions=False)


def test_a_package_that_does_not_say_how_inputs_are_made(tmp_path: Path) -> None:
    from tests.toy import TinyNet, images

    exitkit.export(exitkit.attach(TinyNet().eval(), images(), method="sdn", every=2), tmp_path / "model.pt2", 0.5)
    with pytest.raises(exitkit.ExitkitError, match=r"does not say how images or texts become tensors"):
        CliRunner().invoke(app, ["run", str(tmp_path / "model.pt2"), "x.png"], catch_exceptions=False)
