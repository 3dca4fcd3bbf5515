"""What people's own photos and texts become: as timm prepares them, upright, whole, and said where something is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import exitkit
from exitkit.cli.app import app
from exitkit.cli.bench import check_classes
from exitkit.common.errors import FileError
from exitkit.common.intervals import share_interval
from exitkit.multi_exit.image_files import opened_image
from exitkit.multi_exit.preprocessing import ImagePreprocessing, TextPreprocessing, preprocessing_from_json
from tests.toy import TinyNet, images

Image = pytest.importorskip("PIL.Image")

SIZES = [(640, 427), (100, 301), (224, 224), (33, 20)]


def photo(width: int, height: int, seed: int = 0) -> Any:
    """Smooth colours with an edge, so that both the way of resizing and the place of the crop show."""
    across, down = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 4, height))
    waves = np.stack([np.sin(across + seed), np.cos(down * across), np.sin(across * 9 + down)], -1)
    return Image.fromarray(((waves + 1) * 127).astype(np.uint8))


@pytest.mark.parametrize(
    "config",
    [
        {"crop_pct": 0.95, "interpolation": "bicubic"},
        {"crop_pct": 0.875, "interpolation": "bilinear", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)},
        {"crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "squash"},
        {"crop_pct": 0.9, "interpolation": "lanczos", "crop_mode": "border"},
        {"crop_pct": 1.15, "interpolation": "nearest", "input_size": (3, 96, 96)},
        {"crop_pct": 0.9, "input_size": (3, 96, 128)},
        {"input_size": (3, 32, 32)},
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_images_become_what_timm_makes_of_them(config: dict[str, Any]) -> None:
    data = pytest.importorskip("timm.data")
    model = nn.Conv2d(3, 4, 3)
    model.pretrained_cfg = {"input_size": (3, 224, 224), **config}  # type: ignore[assignment]
    theirs = data.create_transform(**data.resolve_data_config(pretrained_cfg=model.pretrained_cfg), is_training=False)
    ours = ImagePreprocessing.of(model)
    assert ours is not None
    for size in SIZES:
        assert torch.equal(ours([photo(*size)])[0], theirs(photo(*size))), size


def test_a_real_timm_model_brings_its_configuration_through_a_package() -> None:
    timm = pytest.importorskip("timm")
    from exitkit.multi_exit.preprocessing import preprocessing_to_json

    model = timm.create_model("tf_efficientnet_lite1")
    made = ImagePreprocessing.of(model)
    assert made is not None
    assert (made.size, made.crop_pct, made.interpolation) == ((3, 240, 240), 0.882, "bicubic")
    assert preprocessing_from_json(preprocessing_to_json(made)) == made


def test_an_older_package_prepares_images_as_it_did() -> None:
    old = {"kind": "image", "size": (3, 112, 112), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    made: Any = preprocessing_from_json(old)
    small = photo(300, 200).resize((192, 128), Image.Resampling.BILINEAR).crop((40, 8, 152, 120))
    assert torch.equal(made([photo(300, 200)])[0], torch.from_numpy(np.array(small)).permute(2, 0, 1) / 127.5 - 1)


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("limit", [100, 10])
def test_an_image_of_more_pixels_than_pillow_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Pillow refuses alone what has twice as many."""
    photo(15, 10).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    assert opened_image(str(tmp_path / "large.png")).size == (15, 10)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(FileError, match=r"large\.png' cannot be read as an image: .*(pixels|PIXELS)"):
        opened_image(str(tmp_path / "large.png"))


def test_a_photo_is_seen_as_it_was_taken(tmp_path: Path) -> None:
    """All eight orientations of EXIF, written as a camera does: pixels as the sensor has them, and a tag."""
    upright = photo(48, 32)
    undone = {
        1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270",
    }  # fmt: skip
    preprocessing = ImagePreprocessing((3, 32, 32), (0.0,) * 3, (1.0,) * 3)
    for orientation, turned in undone.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        sensor = upright if turned is None else upright.transpose(Image.Transpose[turned])
        sensor.save(tmp_path / "photo.png", exif=exif)
        seen = opened_image(str(tmp_path / "photo.png"))
        assert np.array_equal(np.asarray(seen.convert("RGB")), np.asarray(upright)), orientation
        with Image.open(tmp_path / "photo.png") as image:  # a program that calls a package's preprocessing on its own
            assert torch.equal(preprocessing([image]), preprocessing([upright])), orientation


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_are_scaled(tmp_path: Path, ending: str) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / f"ramp.{ending}")
    made = ImagePreprocessing((1, 64, 64), (0.0,), (1.0,))([opened_image(str(tmp_path / f"ramp.{ending}"))])
    assert torch.allclose(made[0, 0].double(), torch.from_numpy(ramp / 65535), atol=0.51 / 255)


def test_colours_of_every_mode(tmp_path: Path) -> None:
    colour = Image.new("RGB", (8, 8), (200, 40, 90))
    preprocessing = ImagePreprocessing((3, 8, 8), (0.0,) * 3, (1.0,) * 3)
    expected = torch.tensor([200, 40, 90]).view(3, 1, 1).expand(3, 8, 8) / 255
    transparent = colour.convert("P", palette=Image.Palette.ADAPTIVE)
    transparent.save(tmp_path / "palette.png", transparency=bytes([128] * 4))
    colour.convert("CMYK").save(tmp_path / "cmyk.tif")
    for name in ("palette.png", "cmyk.tif"):
        made = preprocessing([opened_image(str(tmp_path / name))])[0]
        assert torch.allclose(made, expected, atol=0.01), name
    assert preprocessing([np.zeros((8, 8), np.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)]).abs().max() == 0


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("F", (8, 8)), r"mode 'F', which does not say what value is white; save it with 8 or 16 bits"),
        (Image.new("I", (8, 8), 70_000), r"mode 'I', which does not say"),
        (Image.new("RGB", (1, 10**7)), r"would be resized to 8 x 80000000; crop it first"),
        (np.zeros((8, 8), np.float32), r"image is float32; give a PIL image, or a uint8 array"),
        ("cat.jpg", r"image is str; give a PIL image"),
    ],
)
def test_images_that_cannot_be_prepared(image: Any, message: str) -> None:
    with pytest.raises(exitkit.ExitkitError, match=message):
        ImagePreprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)([image])


def test_channels_that_no_image_has() -> None:
    with pytest.raises(exitkit.ExitkitError, match=r"takes 5 channels, and images have 1 \(grey\) or 3"):
        ImagePreprocessing((5, 8, 8), (0.5,) * 5, (0.5,) * 5)([photo(9, 9)])


def tokenizer(limit: int | None = None) -> Any:
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "good", "bad", "film"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    options = {} if limit is None else {"model_max_length": limit}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", **options)


def bert(kind: str, positions: int, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=5, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=positions, pad_token_id=0, **options,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()


@pytest.mark.parametrize(
    ("kind", "positions", "limit", "expected"),
    [
        ("Bert", 64, None, 64),
        ("Bert", 64, 512, 64),
        ("Bert", 300, 40, 40),
        ("Roberta", 66, None, 65),  # positions are counted from behind the padding token's
    ],
)
def test_texts_are_as_long_as_tokenizer_and_model_take(
    kind: str, positions: int, limit: int | None, expected: int
) -> None:
    model = bert(kind, positions)
    made = TextPreprocessing.of(tokenizer(limit), ["input_ids", "attention_mask"], model=model)
    assert made.longest == expected
    with pytest.warns(UserWarning, match=rf"1 of 2 texts were cut at {expected} tokens"):
        tokens = made(["good " * 1000, "film " * expected])
    assert tokens["input_ids"].shape == (2, expected)
    assert model(**tokens).logits.isfinite().all()
    if limit is None:  # it is the most: one more has no position
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, expected + 1), 2), attention_mask=torch.ones(1, expected + 1).long())


@pytest.mark.parametrize(("kind", "positions", "most"), [("Bert", 24, 24), ("Roberta", 26, 25), ("GPT2", 24, 24)])
def test_an_engine_says_how_many_tokens_the_model_has_positions_for(
    kind: str, positions: int, most: int, tmp_path: Path
) -> None:
    """They ended in torch's error, and on a GPU in one that ends the process's use of it."""
    model = bert(kind, positions)

    def tokens(length: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.full((2, length), 2), "attention_mask": torch.ones(2, length, dtype=torch.long)}

    ee = exitkit.attach(model, tokens(9), at=[0], method="sdn")
    engines = [exitkit.compile(ee, 2.0)]
    if kind == "Roberta":
        exitkit.export(ee, tmp_path / "model.pt2", 2.0)
        engines.append(exitkit.load(tmp_path / "model.pt2", trust=True))  # type: ignore[arg-type]
    for engine in engines:
        with torch.no_grad():
            assert torch.allclose(engine(**tokens(most)).logits, model(**tokens(most)).logits, atol=1e-5)
        with pytest.raises(exitkit.ArgumentError, match=rf"has {most + 1} tokens, and the model has {most} positions"):
            engine(**tokens(most + 1))
        with pytest.raises(exitkit.ArgumentError, match=r"has shape \(2, 0\)"):
            engine(**tokens(0))


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "GPT2", "DistilBert"])
def test_token_ids_that_the_model_has_no_row_for(kind: str, tmp_path: Path) -> None:
    """A compiled step ended the process at one, and read beyond the mask where it was shorter than the ids."""
    model = bert(kind, 24)
    tokens = {"input_ids": torch.full((2, 9), 2), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    ee = exitkit.attach(model, tokens, at=[0], method="sdn")
    exitkit.export(ee, tmp_path / "model.pt2", 2.0)
    for engine in (exitkit.compile(ee, 2.0), exitkit.load(tmp_path / "model.pt2", trust=True)):
        for wrong in (5, -1, 2**40):
            ids = tokens["input_ids"].clone()
            ids[1, 3] = wrong
            with pytest.raises(exitkit.ArgumentError, match=rf"'input_ids' holds {wrong}, and the model knows 0 to 4"):
                engine(input_ids=ids, attention_mask=tokens["attention_mask"])
            with pytest.raises(exitkit.ArgumentError, match=rf"batch 1 failed: input .* holds {wrong}"):
                list(engine.map([tokens, tokens | {"input_ids": ids}]))
        for ids_, mask in ((9, 8), (8, 9)):
            with pytest.raises(
                exitkit.ArgumentError, match=rf"\[{mask}, {ids_}\] tokens, and must have the same number"
            ):
                engine(input_ids=tokens["input_ids"][:, :ids_], attention_mask=tokens["attention_mask"][:, :mask])
        with torch.no_grad():
            assert torch.allclose(engine(**tokens).logits, model(**tokens).logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["Llama", "Esm"])
def test_where_positions_are_computed_texts_may_be_longer(kind: str) -> None:
    model = bert(kind, 24, **({"position_embedding_type": "rotary", "mask_token_id": 1} if kind == "Esm" else {}))
    tokens = {"input_ids": torch.full((2, 30), 2), "attention_mask": torch.ones(2, 30, dtype=torch.long)}
    engine = exitkit.compile(exitkit.attach(model, every=1, method="sdn"), 2.0)
    with torch.no_grad():
        assert torch.allclose(engine(**tokens).logits, model(**tokens).logits, atol=1e-5)


def test_a_length_of_ones_own(tmp_path: Path) -> None:
    ee = exitkit.attach(bert("Bert", 64), every=1, method="sdn")
    exitkit.export(ee, tmp_path / "model.pt2", 0.5, tokenizer=tokenizer(), max_length=10)
    description: Any = exitkit.load(tmp_path / "model.pt2", trust=True).description
    assert description.preprocessing.longest == 10
    for options, message in (
        (
            {"tokenizer": tokenizer(), "max_length": 65},
            r"max_length=65: BertForSequenceClassification has 64 positions",
        ),
        ({"tokenizer": tokenizer(), "max_length": 0}, r"max_length=0 must be a whole number at least 1"),
        ({"max_length": 10}, r"max_length=10 is for texts; give their tokenizer= too"),
    ):
        with pytest.raises(exitkit.ExitkitError, match=message):
            exitkit.export(ee, tmp_path / "other.pt2", 0.5, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "other.pt2").exists()


# classes of the data, and of the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "data", "asked", "message"),
    [
        (
            1000,
            10,
            None,
            r"have 10 classes, but the model tells 1000 apart\n--num-classes 10 trains.*; --num-classes 1000 if",
        ),
        (
            3,
            10,
            None,
            r"have 10 classes, but the model tells 3 apart\n--num-classes 10 trains a new last layer [a-z ]*$",
        ),
        (5, 10, 5, r"have 10 classes, but --num-classes 5 was given; give --num-classes 10"),
    ],
)
def test_other_classes_are_refused(model: int, data: int, asked: int | None, message: str) -> None:
    with pytest.raises(exitkit.ExitkitError, match=message):
        check_classes(model, data, asked, "--num-classes {}")


@pytest.mark.parametrize(
    ("model", "data", "asked"), [(10, 10, None), (1000, 10, 1000), (10, None, None), (1, 5, None), (10, 10, 10)]
)
def test_classes_that_fit_or_were_asked_for(model: int, data: int | None, asked: int | None) -> None:
    check_classes(model, data, asked, "--num-classes {}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten photos of four classes, as people have them: turned, of 16 bits, CMYK, with transparency."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for index in range(40):
        place = tmp_path / "photos" / "abcd"[index % 4]
        place.mkdir(parents=True, exist_ok=True)
        image = photo(40 + index, 50, index)
        if index % 5 == 0:
            image.save(place / f"{index}.jpg", exif=exif)
        elif index % 5 == 1:
            Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(place / f"{index}.png")
        elif index % 5 == 2:
            image.convert("CMYK").save(place / f"{index}.jpg")
        elif index % 5 == 3:
            image.convert("P").save(place / f"{index}.png", transparency=0)
        else:
            image.save(place / f"{index}.webp")
    return tmp_path / "photos"


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_bench_on_a_folder_of_other_classes_than_the_models(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    given = ("bench", "--model", "timm:test_vit", "--data", folder, "--out", tmp_path / "run", "--epochs", 1)
    given += ("--methods", "sdn,ztw", "--head", "1L", "--every", 2)
    refused = command(*given)
    assert "the data have 4 classes, but the model tells 1000 apart" in str(refused.exception)
    assert not (tmp_path / "run" / "results.json").exists()
    done = command(*given, "--num-classes", 4)
    assert done.exit_code == 0, done.output
    assert "95% interval" in done.output
    accuracies = json.loads((tmp_path / "run" / "results.json").read_text())["methods"]["ztw"]["accuracy_per_exit"]
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)


def test_a_damaged_file_is_named_before_or_in_training(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    whole = next((folder / "a").glob("*.jpg"))
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    given = ("bench", "--model", "timm:test_vit", "--data", folder, "--out", tmp_path / "run", "--num-classes", 4)
    refused = command(*given, "--epochs", 1, "--methods", "sdn", "--every", 2)
    assert isinstance(refused.exception, FileError)
    assert f"'{whole}' cannot be read as an image" in str(refused.exception)


# exitkit run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    torch.manual_seed(0)
    ee = exitkit.attach(TinyNet().eval(), images(), every=2, method="sdn")
    exitkit.export(ee, path, 0.34, preprocessing=ImagePreprocessing((1, 8, 8), (0.5,), (0.5,)))
    return path


@pytest.fixture(scope="module")
def text_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "text.pt2"
    exitkit.export(exitkit.attach(bert("Bert", 64), every=1, method="sdn"), path, 0.5, tokenizer=tokenizer())
    return path


def test_run_goes_on_after_bad_files_and_says_so(package: Path, folder: Path) -> None:
    (folder / "a" / "cut.jpg").write_bytes((folder / "a" / "0.jpg").read_bytes()[:300])
    (folder / "b" / "text.jpg").write_text("no image")
    (folder / "b" / "empty.png").write_bytes(b"")
    Image.new("F", (8, 8)).save(folder / "c" / "depth.tiff")
    done = command("run", package, folder, "--trust", "--batch-size", 7)
    assert done.exit_code == 3
    assert len(done.stdout.splitlines()) == 40
    assert "4 images skipped" in done.stderr
    for name in ("cut.jpg", "text.jpg", "empty.png", "depth.tiff"):
        assert name in done.stderr


def test_the_same_photo_has_the_same_answer_however_it_is_turned(package: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    photo(48, 32).save(tmp_path / "a.png")
    photo(48, 32).transpose(Image.Transpose.ROTATE_270).save(tmp_path / "b.png", exif=exif)
    first, second = map(json.loads, command("run", package, tmp_path, "--trust").stdout.splitlines())
    assert {**first, "input": ""} == {**second, "input": ""}


def test_images_and_texts_from_stdin(package: Path, text_package: Path, tmp_path: Path) -> None:
    photo(20, 20).save(tmp_path / "a.png")
    named = command("run", package, tmp_path / "a.png", "--trust")
    content = (tmp_path / "a.png").read_bytes()
    piped = CliRunner().invoke(app, ["run", str(package), "-", "--trust"], input=content)
    assert {**json.loads(piped.stdout), "input": ""} == {**json.loads(named.stdout), "input": ""}
    assert json.loads(piped.stdout)["input"] == "-"
    lines = CliRunner().invoke(app, ["run", str(text_package), "-", "--trust"], input="good film\n\nbad\n")
    assert [json.loads(line)["input"] for line in lines.stdout.splitlines()] == ["good film", "bad"]


def test_run_says_how_many_texts_were_cut(text_package: Path) -> None:
    done = command("run", text_package, "good " * 500, "bad", "film " * 65, "film " * 64, "--trust")
    assert done.exit_code == 0, done.output
    assert "2 texts were longer than the package takes, and cut" in done.stderr


def test_the_other_kind_of_input_is_refused(package: Path, text_package: Path, tmp_path: Path) -> None:
    photo(20, 20).save(tmp_path / "a.png")
    (tmp_path / "report.pdf").write_bytes(b"%PDF")
    (tmp_path / "notes.txt").write_text("good film")
    for given, message in (
        ((text_package, tmp_path / "a.png"), "is an image, and this package takes texts: write the text itself"),
        ((text_package, "nowhere.jpg"), "is an image, and this package takes texts"),
        ((text_package, tmp_path), "is a file or folder, and this package takes texts"),
        ((text_package, tmp_path / "report.pdf"), "is a file or folder, and this package takes texts"),
        ((package, tmp_path / "notes.txt"), "holds texts, and this package takes images"),
        ((package, tmp_path / "a.png", "good film"), "'good film' does not exist; this package takes images"),
    ):
        done = command("run", *given, "--trust")
        assert message in str(done.exception)
        assert done.stdout == ""


def test_texts_without_the_tokenizers_library(text_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    done = command("run", text_package, "good film", "--trust")
    assert "texts need the tokenizers library: pip install tokenizers" in str(done.exception)


def test_images_need_neither_torchvision_nor_transformers(package: Path, tmp_path: Path) -> None:
    """In a process of its own, in which neither can be imported."""
    photo(20, 20).save(tmp_path / "a.png")
    hidden = "sys.modules.update(torchvision=None, transformers=None, timm=None)"
    code = f"import sys; {hidden}; import exitkit.cli as cli; cli.main()"
    given = [sys.executable, "-W", "ignore", "-c", code, "run", str(package), str(tmp_path / "a.png"), "--trust"]
    done = subprocess.run(given, capture_output=True, text=True)
    assert json.loads(done.stdout)["exit"] in (0, 1), done.stderr


# τ as it is printed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.99999953, 1 - 2**-53, 0.1 + 0.2, 1.0, -1e-9, 5e-324, float("inf"), 2.0])
def test_what_is_printed_can_be_typed(tau: float) -> None:
    shown = exitkit.ExitPolicy((tau, tau), "confidence").shown()
    assert float(shown) == tau


def test_a_tau_of_the_budget_table_decides_as_its_row_says() -> None:
    """Scores of one sample next to another's, as of a model that is sure of everything: six digits would be 1."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 3, 4, generator=generator) * torch.tensor([8.0, 20, 30]).view(3, 1)
    outputs = exitkit.ExitOutputs(
        logits.log_softmax(-1), torch.randint(4, (200,), generator=generator), torch.tensor([1, 2, 4]), 4
    )
    table = outputs.curve().budget_table()
    assert any(point is not None and 0.9999995 <= point.policy.thresholds[0] < 1 for point in table.rows.values())
    printed = {line[:15].strip(): line.split()[-1] for line in str(table).splitlines()[1:]}
    for name, point in table.rows.items():
        if point is not None:
            exits = outputs.exits_at(float(printed[name]))
            assert outputs.costs[exits].mean() == pytest.approx(point.cost, rel=1e-12)
            assert outputs.correct.numpy()[np.arange(200), exits].mean() == pytest.approx(point.accuracy)


def test_the_tau_of_a_point_has_as_few_decimals_as_can_be() -> None:
    """Both samples leave below 0.6, one below 0.71828: nothing shorter than 0.6 and 1 lies between."""
    probabilities = torch.tensor([[0.71828, 0.28172], [0.6, 0.4]])
    log_probs = torch.stack([probabilities, torch.tensor([[0.9, 0.1]] * 2)], 1).log()
    outputs = exitkit.ExitOutputs(log_probs, torch.tensor([0, 0]), torch.tensor([1, 2]), 2)
    curve = outputs.curve()
    assert [curve.short_threshold(index) for index in range(3)] == pytest.approx([0.0, 0.7, 1.0])


@pytest.mark.parametrize(("right", "samples"), [(7, 10), (0, 25), (480, 500)])
def test_the_interval_of_an_accuracy_is_wilsons(right: int, samples: int) -> None:
    """His formula, written out."""
    z, share = 1.959963984540054, right / samples
    middle = (share + z**2 / (2 * samples)) / (1 + z**2 / samples)
    half = z / (1 + z**2 / samples) * (share * (1 - share) / samples + z**2 / (4 * samples**2)) ** 0.5
    assert share_interval(share, samples) == pytest.approx((middle - half, middle + half), abs=1e-9)


def test_no_guarantee_is_praised_that_saves_nothing() -> None:
    """Half of the samples leave at an exit that costs 90%, the others pay for its head: 1.05 of the backbone."""
    logits = torch.zeros(1000, 2, 2)
    logits[:500, :, 0] = 9
    logits[500:, 1, 1] = 9
    labels = (torch.arange(1000) >= 500).long()  # the unsure half is wrong at exit 0
    outputs = exitkit.ExitOutputs(logits.log_softmax(-1), labels, torch.tensor([90, 120]), 100)
    policy = exitkit.choose_threshold(outputs, max_drop=0.01)
    assert policy.guarantee is not None
    assert policy.cost == pytest.approx(1.05)
    assert not policy.found
    assert "But nothing is saved: with the exits the cost is 105.0% of the backbone's" in str(policy.guarantee)
    cheap = exitkit.ExitOutputs(outputs.log_probs, outputs.labels, torch.tensor([40, 120]), 100)
    chosen = exitkit.choose_threshold(cheap, max_drop=0.01)
    assert chosen.found
    assert "nothing is saved" not in str(chosen.guarantee)
