"""The command line as a user types it: every kind of model and data, and wrong input on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exitkit.cli import main
from tests.toy import TinyNet

Run = Callable[..., str]
TOY = "tests.toy:net"


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str, str]]:
    """``invoke("inspect", ...)``: exit code, stdout and stderr of the command."""

    def call(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr("sys.argv", ["exitkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return (stop.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def run(invoke: Callable[..., tuple[Any, str, str]]) -> Run:
    """``run("inspect", ...)``: what the command printed; a non-zero exit code fails."""

    def call(*arguments: object) -> str:
        code, printed, _ = invoke(*arguments)
        assert code in (0, None)
        return printed

    return call


@pytest.fixture
def refused(invoke: Callable[..., tuple[Any, str, str]]) -> Run:
    """``refused(...)``: what went to stderr of a command that must end with code 2 and without a traceback."""

    def call(*arguments: object) -> str:
        code, _, error = invoke(*arguments)
        assert code == 2
        assert "Traceback" not in error
        return error

    return call


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """60 grey 8×8 images of three classes as .npz."""
    labels = np.arange(60) % 3
    pixels = np.clip(np.random.default_rng(0).normal(40 + 80 * labels[:, None, None], 20, (60, 8, 8)), 0, 255)
    np.savez(tmp_path / "images.npz", images=pixels.astype(np.uint8), labels=labels)
    return tmp_path / "images.npz"


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A folder with a tiny BERT configuration and a word-level vocabulary."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    transformers.BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, num_labels=2
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", "--model", TOY, "--data", "IMAGES", "--out", ""),
        ("demo", "--out="),
        ("export", "RUN", "--out", ""),
        ("rl", "clone", "--policy", "a.zip", "--env", "CartPole-v1", "--out", ""),
    ],
)
def test_an_empty_out_is_not_taken_for_the_current_folder(
    refused: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(*arguments).startswith("exitkit: --out is empty; name a file or a folder (. is the current folder)")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_inspect_prints_boundaries_and_cost(run: Run, name: str) -> None:
    pytest.importorskip(name.partition(":")[0])
    printed = run("inspect", name)
    assert "layer4.0" in printed
    assert "1.81 GMACs" in printed


def test_inspect_of_a_folder_and_of_a_function(run: Run, bert: Path) -> None:
    assert "bert.encoder.layer.1" in run("inspect", f"hf:{bert}").replace("\n", "")
    assert "blocks.2" in run("inspect", TOY, "--image-size", 8)


def test_bench_on_arrays_writes_everything(run: Run, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    printed = run("bench", "--model", TOY, "--data", images, "--epochs", 1, "--out", out, "--methods", "sdn,pbee,ztw")
    assert "ztw" in printed
    assert {path.name for path in out.iterdir()} == {
        "curve.png",
        "exits",
        "hindsight.png",
        "inputs.safetensors",
        "results.json",
        "samples.json",
        *(f"outputs-{method}.safetensors" for method in ("sdn", "pbee", "ztw")),
    }
    results = json.loads((out / "results.json").read_text())
    assert list(results["methods"]["ztw"]["budgets"]) == [
        "25%",
        "50%",
        "75%",
        "100%",
        "Max (no limit)",
        "Max (best τ)",
    ]


def test_a_run_is_calibrated_compared_and_reported(run: Run, refused: Run, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(
        "bench",
        "--model",
        TOY,
        "--data",
        images,
        "--test",
        images,
        "--epochs",
        1,
        "--out",
        out,
        "--methods",
        "sdn,ztw",
    )
    printed = run("calibrate", out, "--max-drop", 0.5, "--outputs", "ztw", "--share", 0.4).replace("\n", " ")
    assert "of the 24 calibration samples" in printed
    assert "On 36 other samples" in printed
    assert "Each promise" not in printed
    chosen = json.loads((out / "thresholds.json").read_text())
    assert list(chosen) == ["ztw"]
    assert chosen["ztw"]["check"]["samples"] == 36
    assert "sdn – ztw" in run("compare", out, "--budget", 0.8, "--resamples", 40)
    (pair,) = json.loads(run("compare", out, "--budget", 0.8, "--resamples", 40, "--json"))
    assert [pair[key] for key in ("first", "second", "budget")] == ["sdn", "ztw", 0.8]
    assert "top-2 accuracy" in run("compare", out, "--budget", 0.8, "--resamples", 40, "--top", 2)
    pairs = json.loads(run("compare", out, "--budget", 0.8, "--resamples", 40, "--top", 2, "--json"))
    assert (pairs[0], [one["top"] for one in pairs]) == (pair, [1, 2])
    assert "--top 0 must be at least 1" in refused("compare", out, "--top", 0)
    assert "top=99 must be a whole number" in refused("compare", out, "--top", 99)
    told = refused("bench", "--model", TOY, "--data", images, "--max-length", 9, "--out", tmp_path / "other")
    assert f"max_length=9 is for text, and --data '{images}' is no .csv or .tsv" in told.replace("\n", "")
    assert "report.html" in run("report", out).replace("\n", "")
    page = (out / "report.html").read_text("utf-8")
    assert chosen["ztw"]["chosen"]["guarantee"]["words"] in page
    assert "blocks.2" in page  # the stage table
    assert "data:image/webp" in page
    assert "max_drop=0.0 must lie between" in refused("calibrate", out, "--max-drop", 0)
    assert "max_drop=1.0 must lie between" in refused("calibrate", out, "--max-drop", 1)
    assert "risk='loss' is unknown" in refused("calibrate", out, "--risk", "loss")
    assert "outputs='gpf' is unknown" in refused("calibrate", out, "--outputs", "gpf")
    assert "at least two" in refused("compare", out / "outputs-sdn.safetensors")
    assert "holds no run itself, but 1 below it" in refused("compare", tmp_path, out)
    assert "holds no run itself, but 1 below it" in refused("report", tmp_path)
    assert json.loads((out / "thresholds.json").read_text()) == chosen
    both = run("calibrate", out, "--max-drop", 0.5, "--confidence", 0.9).replace("\n", " ")
    assert "The cheapest of 2 keeps its own with a confidence of at least 0.8; --confidence 0.95 makes it 0.9." in both


def test_bench_on_text(run: Run, bert: Path, tmp_path: Path) -> None:
    rows = [f"{'good' if i % 2 else 'bad'} film\t{i % 2}" for i in range(40)]
    (tmp_path / "reviews.tsv").write_text("\n".join(["text\tlabel", *rows]))
    out = tmp_path / "run"
    run(
        "bench",
        "--model",
        f"hf:{bert}",
        "--data",
        tmp_path / "reviews.tsv",
        "--epochs",
        1,
        "--out",
        out,
        "--methods",
        "ztw",
    )
    assert (out / "results.json").exists()


def test_bench_on_an_image_folder_with_weights(run: Run, tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    from PIL import Image

    for split in ("train", "val"):
        for label, shade in (("dark", 30), ("light", 220)):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (40, 30), (shade + index,) * 3).save(folder / f"{index}.png")
    weights = tmp_path / "weights.pth"
    torch.save(torchvision.models.squeezenet1_1(num_classes=2).state_dict(), weights)
    out = tmp_path / "run"
    run(
        *("bench", "--model", "torchvision:squeezenet1_1", "--num-classes", 2, "--weights", weights, "--epochs", 1),
        *("--data", tmp_path / "data", "--every", 3, "--head", "1L", "--methods", "sdn", "--out", out),
    )
    assert (out / "outputs-sdn.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "said"), [((), "1 thread: the backbone costs"), (("--threads", 2), "2 threads: as")]
)
def test_bench_says_how_many_threads_it_computes_with(
    run: Run, images: Path, tmp_path: Path, flags: tuple[object, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr("exitkit.cli.bench.compare", lambda *_, **__: seen.append(torch.get_num_threads()) or {})
    try:
        printed = run("bench", "--model", TOY, "--data", images, "--out", tmp_path / "out", *flags)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert said in printed
    assert seen == [int(said[0])]


def test_bench_refuses_no_threads(refused: Run, images: Path, tmp_path: Path) -> None:
    error = refused("bench", "--model", TOY, "--data", images, "--out", tmp_path, "--threads", 0)
    assert "--threads 0 must be at least 1" in error


def test_demo_shows_a_table_and_writes_the_plot(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    printed = run("demo", "--out", tmp_path / "demo")
    assert "backbone: 9" in printed
    assert (tmp_path / "demo" / "curve.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "resnet18"), "SOURCE:NAME"),
        (("inspect", "torchvision:resnet81"), "Did you mean 'resnet18'"),
        (("inspect", "timm:resnet81"), "Did you mean"),
        (("inspect", "nowhere.module:net"), "nowhere"),
        (("inspect", "hf:/no/such/folder"), "/no/such/folder"),
        (("inspect", "torchvision:resnet18", "--weights", "/no/such/file"), "--weights '/no/such/file'"),
        (("inspect", TOY, "--weights", "pretrained"), f"--model '{TOY}' returns its own weights; leave it out"),
        (
            ("inspect", TOY),
            "TinyNet does not say what it takes; give the side of its input images, such as --image-size 32",
        ),
        (
            ("inspect", TOY, "--num-classes", "5"),
            f"--model {TOY} takes no num_classes, and num_classes=5 is asked for; let the function take it",
        ),
        (("inspect", TOY, "--image-size", "-8"), "--image-size -8 must be at least 1"),
        (("inspect", "torchvision:fasterrcnn_resnet50_fpn"), "fasterrcnn"),
    ],
)
def test_wrong_models_are_refused(refused: Run, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(*arguments).replace("\n", " ")


@pytest.mark.parametrize("make", [lambda num_classes: TinyNet(num_classes), lambda **options: TinyNet(**options)])
def test_a_function_is_given_the_number_of_classes(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from exitkit.cli.sources import load_model

    monkeypatch.setattr("tests.toy.net", make)
    assert load_model(TOY, num_classes=5)(torch.zeros(2, 1, 8, 8)).shape == (2, 5)


def test_a_configuration_that_transformers_refuses_is_not_called_missing(refused: Run, bert: Path) -> None:
    (bert / "config.json").write_text('{"model_type": "nothing-known"}')
    error = refused("inspect", f"hf:{bert}").replace("\n", " ")
    assert "cannot be loaded" in error
    assert "neither a folder" not in error


def test_pairs_are_the_first_two_columns(tmp_path: Path) -> None:
    from exitkit import ArgumentError
    from exitkit.cli.inputs import pairs

    table = tmp_path / "table.csv"
    table.write_text('\ufefffirst,second,label\n"one, and",two,1\n\nthree,four,0\n', encoding="utf-8")
    assert list(pairs([str(table), str(table)])) == 2 * [("one, and", "two"), ("three", "four")]
    table.write_text("text\ngood film\n")
    for given, words in (
        (str(table), "1 column, and --pairs takes two texts"),
        ("good film", r"no \.csv or \.tsv file"),
    ):
        with pytest.raises(ArgumentError, match=words):
            pairs([given])


def test_weights_that_are_no_state_dict_are_refused_in_one_line(refused: Run, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    error = refused("inspect", TOY, "--weights", tmp_path / "text.pth")
    assert "text.pth' cannot be read as a state dict (UnpicklingError); give what torch.save(" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--data": "/no/such/data"}, "/no/such/data"),
        ({"--data": "NoSuchDataset"}, "NoSuchDataset"),
        ({"--methods": "sdn,zwt"}, "'ztw'"),
        ({"--every": 0}, "every=0"),
        ({"--epochs": 0}, "epochs=0"),
        ({"--batch-size": 0}, "--batch-size 0"),
        ({"--head": "huge"}, "head='huge'"),
        ({"--test": "/no/such/test.npz"}, "/no/such/test.npz"),
    ],
)
def test_wrong_bench_arguments_leave_nothing_behind(
    refused: Run, images: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    out = tmp_path / "run"
    options = {"--model": TOY, "--data": images, "--out": out, "--epochs": 1, "--methods": "sdn"} | change
    assert message in refused("bench", *(part for option in options.items() for part in option))
    assert not out.exists()


def test_damaged_and_foreign_arrays_are_refused(refused: Run, images: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(images.read_bytes()[:200])
    foreign = tmp_path / "foreign.npz"
    np.savez(foreign, x=np.zeros(3))
    text = tmp_path / "text.npz"
    text.write_text("no archive")
    for path in (damaged, text):
        assert "cannot be read as .npz" in refused("bench", "--model", TOY, "--data", path, "--out", tmp_path / "run")
    assert "'images' and 'labels'" in refused("bench", "--model", TOY, "--data", foreign, "--out", tmp_path / "run")


def test_arrays_with_channels_first_are_explained(refused: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "first.npz", images=np.zeros((20, 3, 32, 32), np.uint8), labels=np.arange(20) % 3)
    error = refused(
        "bench", "--model", "exitkit.models:cifar_resnet", "--data", tmp_path / "first.npz", "--out", tmp_path / "run"
    )
    assert "has 32 channels, but the model takes 3; the channels come first: images.transpose(0, 2, 3, 1)" in error


def test_labels_beyond_the_classifier_are_refused(refused: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "five.npz", images=np.zeros((20, 8, 8), np.uint8), labels=np.arange(20) % 5)
    error = refused("bench", "--model", TOY, "--data", tmp_path / "five.npz", "--out", tmp_path / "run")
    assert "the data have 5 classes, but the model tells 3 apart" in error


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0] * 20, "holds one class, from which nothing can be learned"),
        (list(range(-1, 9)), "labels run from -1 to 8; classes are counted from 0"),
        ([0, 1, 2, 0], "has 4 samples, and a fifth of them, which is held out, is none"),
    ],
)
def test_data_that_nothing_can_be_learned_from_are_refused(
    refused: Run, tmp_path: Path, bert: Path, labels: list[int], said: str
) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((len(labels), 8, 8), np.uint8), labels=np.array(labels))
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"good film,{label}\n" for label in labels))
    for model, data in ((TOY, tmp_path / "a.npz"), (f"hf:{bert}", tmp_path / "a.csv")):
        error = refused("bench", "--model", model, "--data", data, "--out", tmp_path / "run")
        assert said in error
        assert f"--data '{data}'" in error


@pytest.mark.parametrize(("row", "columns"), [("a good film, and long,1", 3), ("good film", 1)])
def test_rows_with_other_columns_than_the_header_are_refused(
    refused: Run, tmp_path: Path, bert: Path, row: str, columns: int
) -> None:
    """What lay behind the comma was left out without a word, and so was a row without a label."""
    rows = "".join(f"good film,{label % 2}\n" for label in range(20))
    (tmp_path / "a.csv").write_text(f"text,label\n\n{rows}{row}\n")
    error = refused("bench", "--model", f"hf:{bert}", "--data", tmp_path / "a.csv", "--out", tmp_path / "run")
    assert f"row 21 below the header has {columns} column{'s' * (columns > 1)}, and the header 2: ['" in error
    assert "a text with commas stands in quotation marks" in error


@pytest.mark.parametrize(
    ("labels", "classes", "names"),
    [
        (["joy", "Anger", "fear"], [2, 0, 1], ["anger", "fear", "joy", "sadness"]),  # the model's own; one is missing
        (["spam", "ham", "spam"], [1, 0, 1], ["ham", "spam"]),
        (["10.0", "2.0", "0.0"], [10, 2, 0], None),  # as pandas writes a column of numbers with gaps
        ([" 1", "0 ", "2"], [1, 0, 2], None),
    ],
)
def test_labels_of_texts_are_numbered_as_the_model_numbers_them(
    tmp_path: Path, bert: Path, labels: list[str], classes: list[int], names: list[str] | None
) -> None:
    """They were in alphabetical order, so that a model with another was wrong about most of them."""
    from exitkit.cli.data.loading import load_data
    from exitkit.cli.sources import load_model

    config = json.loads((bert / "config.json").read_text())
    config["id2label"] = {"0": "anger", "1": "fear", "2": "joy", "3": "sadness"}
    (bert / "config.json").write_text(json.dumps(config))
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"good film,{label}\n" for label in labels))
    split = load_data(str(tmp_path / "a.csv"), load_model(f"hf:{bert}"), str(tmp_path / "a.csv"), str(bert))
    assert [label for _, label in split.test] == classes
    assert split.classes == (len(names) if names else max(classes) + 1)
    assert getattr(split.test, "classes", None) == names


def test_columns_that_are_not_read_are_named(tmp_path: Path, bert: Path) -> None:
    """Numbers of rows, in the first column, were learned as texts without a word."""
    from exitkit.cli.data.loading import load_data
    from exitkit.cli.sources import load_model

    (tmp_path / "a.csv").write_text("id,text,label\n" + 5 * "1,good film,1\n2,bad film,0\n")
    split = load_data(str(tmp_path / "a.csv"), load_model(f"hf:{bert}"), None, str(bert))
    assert split.note == f"the text is the first column of '{tmp_path / 'a.csv'}', the label the last; not read: text"
    split = load_data(str(tmp_path / "a.csv"), load_model(f"hf:{bert}"), None, str(bert), pairs=True)
    assert split.note == ""


def test_a_row_without_a_label_is_named(refused: Run, tmp_path: Path, bert: Path) -> None:
    """Rows without labels became a class of their own."""
    (tmp_path / "a.csv").write_text("text,label\n" + 4 * "good film,1\nbad film,0\n" + "good film, \n")
    error = refused("bench", "--model", f"hf:{bert}", "--data", tmp_path / "a.csv", "--out", tmp_path / "run")
    assert "row 9 below the header has no label: ['good film', '']" in error


def test_run_refuses_the_rows_that_training_refuses(tmp_path: Path) -> None:
    """A text was cut at its first comma, and the answer was that of its beginning."""
    from exitkit import ArgumentError
    from exitkit.cli.inputs import pairs, texts

    table = tmp_path / "a.csv"
    table.write_text('\ufeff"text, whole",label\r\n\r\n"good, long",1\r\nnot good, and long,0\r\n', encoding="utf-8")
    for read in (texts, pairs):
        with pytest.raises(
            ArgumentError, match=r"row 2 below the header has 3 columns, and the header 2: \['not good'"
        ):
            read([str(table)])
    table.write_text("good film\n")  # without a header
    with pytest.raises(ArgumentError, match="no rows below a header"):
        texts([str(table)])


def test_an_ending_in_capitals_separates_by_tabs_too() -> None:
    from exitkit.cli.data.text_files import cells

    assert list(cells(["good, film\t1"], Path("A.TSV"))) == [["good, film", "1"]]


def test_a_folder_of_one_class_is_refused(refused: Run, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    from PIL import Image

    (tmp_path / "photos" / "all").mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "all" / f"{number}.png")
    error = refused(
        *("bench", "--model", "torchvision:resnet18", "--data", tmp_path / "photos", "--out", tmp_path / "run")
    )
    assert "holds one class" in error
    assert "a subfolder for each class" in error


def test_a_class_may_have_no_test_images(refused: Run, tmp_path: Path) -> None:
    """An empty subfolder, which the message asks for, was refused too."""
    pytest.importorskip("torchvision")
    from PIL import Image

    from exitkit.cli.data.loading import load_data

    for folder in ("train/a", "train/b", "val/b"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "0.png")
    given = ("--model", "torchvision:resnet18", "--data", tmp_path, "--out", tmp_path / "run")
    assert "both need the same subfolders, also empty ones" in refused("bench", *given)
    (tmp_path / "val" / "a").mkdir()
    model = TinyNet()
    model.pretrained_cfg = {"input_size": (1, 8, 8)}
    split = load_data(str(tmp_path), model)
    assert [label for _, label in split.test] == [1]
    assert split.classes == 2
    (tmp_path / "val" / "b" / "0.png").unlink()
    assert "holds no images in its subfolders" in refused("bench", *given)


def test_percent_that_look_like_shares_are_refused(refused: Run, images: Path, tmp_path: Path) -> None:
    for option in ("--at-cost", "--budgets"):
        error = refused("bench", "--model", TOY, "--data", images, "--out", tmp_path / "run", option, "0.15,0.5")
        assert f"{option} '0.15,0.5' is in percent: 0.15 is 0.15%; write 15 for 15%" in error


def test_numeric_text_labels_are_class_indices(tmp_path: Path, bert: Path) -> None:
    """Labels 2, 10 and 11 must stay so: as words they would sort as 10, 11, 2."""
    from exitkit.cli.data.loading import load_data

    (tmp_path / "many.csv").write_text("text,label\n" + "\n".join(f"good film,{label}" for label in (2, 10, 11) * 10))
    train, _ = load_data(str(tmp_path / "many.csv"), torch.nn.Identity(), tokenizer=str(bert)).loaders(24, None, 0)
    assert set(next(iter(train))["labels"].tolist()) == {2, 10, 11}


def test_an_out_that_is_a_file_is_refused_before_training(refused: Run, images: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    for out in (tmp_path / "taken", tmp_path / "taken" / "run"):
        error = f"--out '{out}': '{tmp_path / 'taken'}' is a file"
        assert error in refused("bench", "--model", TOY, "--data", images, "--out", out)
        assert error in refused("demo", "--out", out)
    assert (tmp_path / "taken").read_text() == "mine"


def test_test_images_of_other_classes_are_refused(refused: Run, tmp_path: Path) -> None:
    from PIL import Image

    for folder in ("train/a", "train/b", "test/b", "test/c"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / folder / "0.png")
    error = refused(
        *("bench", "--model", "torchvision:squeezenet1_1", "--data", tmp_path / "train", "--test", tmp_path / "test"),
        *("--out", tmp_path / "run"),
    )
    assert f"--test '{tmp_path / 'test'}' has the classes ['b', 'c']" in error


def test_what_is_wrong_with_test_samples_is_said_of_them(refused: Run, images: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "data" / "a").mkdir(parents=True)
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "data" / "a" / "0.png")
    np.savez(tmp_path / "foreign.npz", x=np.zeros(3))
    for model, data, test in (
        ("torchvision:squeezenet1_1", tmp_path / "data", tmp_path / "empty"),
        (TOY, images, tmp_path / "foreign.npz"),
    ):
        error = refused("bench", "--model", model, "--data", data, "--test", test, "--out", tmp_path / "run")
        assert f"--test '{test}'" in error
        assert "--data" not in error


@pytest.mark.parametrize(
    ("command", "option"), [("bench", "--test"), ("retrofit", "--calibration")], ids=["bench", "retrofit"]
)
def test_held_out_labels_beyond_the_classifier_are_refused_before_training(
    refused: Run, images: Path, tmp_path: Path, command: str, option: str
) -> None:
    np.savez(tmp_path / "five.npz", images=np.zeros((20, 8, 8), np.uint8), labels=np.arange(20) % 5)
    error = refused(
        command, "--model", TOY, "--data", images, option, tmp_path / "five.npz", "--out", tmp_path / "run"
    )
    assert "the data have 5 classes, but the model tells 3 apart" in error
    assert "epoch" not in error


def test_labels_of_other_names_do_not_count_as_classes(images: Path, tmp_path: Path) -> None:
    from exitkit.cli.data.loading import load_data

    with np.load(images) as file:
        np.savez(tmp_path / "more.npz", **file, coarse_labels=np.full(60, 90))
    assert load_data(str(tmp_path / "more.npz"), torch.nn.Identity()).classes == 3


def test_test_samples_that_are_learned_from_are_warned_of(images: Path) -> None:
    from exitkit.cli.data.loading import load_data

    with pytest.warns(
        UserWarning, match=r"^--test '.*' is --data itself: .*leave --test out, and a fifth of --data is held"
    ):
        load_data(str(images), torch.nn.Identity(), str(images))


def test_a_folder_is_no_state_dict(refused: Run, tmp_path: Path) -> None:
    assert f"--weights '{tmp_path}' is a folder" in refused("inspect", TOY, "--weights", tmp_path)


def test_a_classifier_of_no_classes_is_refused(refused: Run) -> None:
    assert "--num-classes 0 must be at least 1" in refused("inspect", "torchvision:resnet18", "--num-classes", 0)


def test_a_checkpoint_in_half_precision_is_trained_in_single(bert: Path) -> None:
    """Heads have the backbone's precision, and Adam's first step in float16 gives NaN."""
    transformers = pytest.importorskip("transformers")
    from exitkit.cli.sources import load_model

    whole = transformers.AutoModelForSequenceClassification.from_config(transformers.AutoConfig.from_pretrained(bert))
    whole.half().save_pretrained(bert)
    loaded = load_model(f"hf:{bert}")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.classifier.weight.half(), whole.classifier.weight)
