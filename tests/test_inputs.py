"""What people's own photos and texts become: as timm prepares them, upright, whole, and said where something is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import exitkit
from exitkit.cli.unpacking import opened_image
from exitkit.multi_exit.preprocessing import ImagePreprocessing, TextPreprocessing, preprocessing_from_json

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
        (Image.new("F", (8, 8)), r"mode 'F', whose white nothing tells; save it with 8 or 16 bits"),
        (Image.new("I", (8, 8), 70_000), r"mode 'I', whose white"),
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


def bert(kind: str, positions: int) -> Any:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=5, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=positions, pad_token_id=0,
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
