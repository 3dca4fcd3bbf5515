"""Example inputs: what a torchvision, timm or Hugging Face model declares is what ``attach`` feeds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import exitkit
from exitkit.surgery.capturing import logits_of
from exitkit.surgery.default_inputs import example_for
from exitkit.surgery.inputs import call_on

transformers = pytest.importorskip("transformers")

CLASSES = 5
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TOKENS = {"vocab_size": 60, "max_position_embeddings": 64, "num_labels": CLASSES}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PAIR = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
}  # fmt: skip
WAVES = {**SIZE, "num_labels": CLASSES, "conv_dim": (8, 8), "conv_stride": (40, 8), "conv_kernel": (40, 8),
         "num_feat_extract_layers": 2, "num_conv_pos_embedding_groups": 2}  # fmt: skip


def hugging_face(model: str, config: str, **fields: Any) -> nn.Module:
    built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**fields))
    return built.eval()


def inferred(model: nn.Module) -> dict[str, Tensor]:
    """The inferred tensors by name; an image model's only one is called ``x``."""
    example = example_for(model)
    return {"x" if isinstance(key, int) else key: t for key, t in zip(example.spec.keys, example.tensors, strict=True)}


def bert(**fields: Any) -> nn.Module:
    return hugging_face("BertForSequenceClassification", "BertConfig", **{**SIZE, **TOKENS, **fields})


def llama(**fields: Any) -> nn.Module:
    return hugging_face("LlamaForSequenceClassification", "LlamaConfig", **{**SIZE, **TOKENS, **SPECIAL, **fields})


def bart() -> nn.Module:
    return hugging_face("BartForSequenceClassification", "BartConfig", **{**PAIR, **TOKENS, **SPECIAL})


def xlnet() -> nn.Module:
    """Says that its longest text has −1 tokens."""
    fields = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "vocab_size": 60, "num_labels": CLASSES}
    return hugging_face("XLNetForSequenceClassification", "XLNetConfig", **fields)


def vit(**fields: Any) -> nn.Module:
    fields = {**SIZE, "image_size": (16, 32), "patch_size": 8, "num_labels": CLASSES, **fields}
    return hugging_face("ViTForImageClassification", "ViTConfig", **fields)


def clip() -> nn.Module:
    """Keeps the image's size in ``vision_config``."""
    vision = {**SIZE, "image_size": 24, "patch_size": 8}
    return hugging_face("CLIPForImageClassification", "CLIPConfig", vision_config=vision, num_labels=CLASSES)


def wav2vec2() -> nn.Module:
    return hugging_face("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **WAVES)


def wav2vec2_bert() -> nn.Module:
    fields = {**SIZE, "feature_projection_input_dim": 12, "num_labels": CLASSES, "vocab_size": 60}
    return hugging_face("Wav2Vec2BertForSequenceClassification", "Wav2Vec2BertConfig", **fields)


def whisper() -> nn.Module:
    fields = {**PAIR, "vocab_size": 60, "num_mel_bins": 8, "max_source_positions": 30, "num_labels": CLASSES}
    return hugging_face("WhisperForAudioClassification", "WhisperConfig", **fields)


def spectrogram_transformer() -> nn.Module:
    fields = {**SIZE, "max_length": 40, "num_mel_bins": 24, "patch_size": 8, "num_labels": CLASSES}
    return hugging_face("ASTForAudioClassification", "ASTConfig", **fields)


TEXT_SHAPES = {"input_ids": (2, 16), "attention_mask": (2, 16)}


@pytest.mark.parametrize(
    ("build", "shapes"),
    [
        (bert, TEXT_SHAPES),
        (llama, TEXT_SHAPES),
        (bart, TEXT_SHAPES),
        (xlnet, TEXT_SHAPES),
        (vit, {"x": (2, 3, 16, 32)}),
        (lambda: vit(num_channels=1), {"x": (2, 1, 16, 32)}),
        (clip, {"x": (2, 3, 24, 24)}),
        (wav2vec2, {"x": (2, 16_000)}),
        (wav2vec2_bert, {"x": (2, 100, 12)}),
        (whisper, {"x": (2, 8, 60)}),
        (spectrogram_transformer, {"x": (2, 40, 24)}),
    ],
)
def test_inferred_inputs_have_the_declared_shape_and_run(build: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    model = build()
    assert {name: tuple(tensor.shape) for name, tensor in inferred(model).items()} == shapes
    example = example_for(model)
    with torch.no_grad():
        assert logits_of(call_on(model, example.spec.batch(example.tensors))).shape == (2, CLASSES)


def test_short_position_tables_shorten_the_text() -> None:
    assert inferred(bert(max_position_embeddings=9))["input_ids"].shape == (2, 9)


@pytest.mark.parametrize("build", [bert, llama, bart])
def test_text_is_padded_by_the_models_own_token(build: Any) -> None:
    batch = inferred(build())
    mask, ids = batch["attention_mask"], batch["input_ids"]
    assert mask[0].all()
    assert mask[1].tolist() == sorted(mask[1].tolist(), reverse=True)
    assert 0 < mask[1].sum() < 16
    assert (ids[mask == 0] == 0).all()
    assert (ids[mask == 1] != 0).all()


@pytest.mark.parametrize("build", [llama, bart])
def test_every_text_ends_with_its_only_end_token(build: Any) -> None:
    """BART classifies at the end token, and needs as many of them in every row."""
    batch = inferred(build())
    assert (batch["input_ids"] == 2).sum(1).tolist() == [1, 1]
    assert (batch["input_ids"] == 2).int().argmax(1).tolist() == (batch["attention_mask"].sum(1) - 1).tolist()


def test_no_other_special_token_occurs() -> None:
    ids = inferred(bert(vocab_size=8, bos_token_id=5, decoder_start_token_id=6, pad_token_id=7))["input_ids"][0]
    assert set(ids.tolist()) <= {0, 1, 2, 3, 4}


def test_inputs_are_the_same_every_time_and_draw_no_random_numbers() -> None:
    model = bert()
    before = torch.get_rng_state()
    first, second = inferred(model), inferred(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_have_the_models_dtype(dtype: torch.dtype) -> None:
    assert inferred(vit().to(dtype))["x"].dtype == dtype


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("resnet18", {}, (2, 3, 224, 224)),
        ("resnet18", {"in_chans": 1}, (2, 1, 224, 224)),
        ("vit_tiny_patch16_224", {"img_size": (32, 64)}, (2, 3, 32, 64)),
        ("tresnet_m", {}, (2, 3, 224, 224)),
        ("csatv2", {}, (2, 3, 512, 512)),
    ],
)
def test_timm_models_take_the_declared_images(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    """TResNet's first convolution reads 48 channels of rearranged pixels, CSATv2's 64 of frequencies."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    assert tuple(inferred(model)["x"].shape) == shape


def test_a_model_that_declares_nothing_is_asked_for_inputs() -> None:
    with pytest.raises(exitkit.ExitkitError, match=r"Linear does not declare.*example_inputs=torch"):
        exitkit.attach(nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (lambda ee: ee.to_empty(device="cpu"), torch.float32),
        (lambda ee: ee.half(), torch.float16),
        (lambda ee: ee.double(), torch.float64),
        (lambda ee: ee.to(torch.bfloat16), torch.bfloat16),
        (lambda ee: ee.to("meta"), torch.float32),
        (lambda ee: ee.to("meta").half().to_empty(device="cpu"), torch.float16),
        (lambda ee: ee.to(memory_format=torch.channels_last), torch.float32),
    ],
    ids=["to_empty", "half", "double", "to bfloat16", "meta", "meta and back", "channels_last"],
)
def test_the_example_of_a_model_keeps_its_values(
    tiny_net: nn.Module, change: Callable[[exitkit.MultiExitModel], exitkit.MultiExitModel], dtype: torch.dtype
) -> None:
    values = torch.tensor([0.5, -0.25]).repeat(64).reshape(2, 1, 8, 8)  # the same in every precision
    ee = change(exitkit.attach(tiny_net, values))
    (kept,) = ee.example.tensors
    assert kept.dtype == dtype
    assert torch.equal(kept.float(), values)
