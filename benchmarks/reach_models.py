"""The models that ``reach.py`` measures: their names, and how each is built with random weights.

Hugging Face models are tiny: every classifier that transformers lists is built from its own configuration class with the
known fields shrunk. Hierarchical image models keep their own depths and widths, which are small, on small images.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exitkit.cli.sources import load_model
from exitkit.common.files import replacing
from exitkit.common.torchvision_guard import import_torchvision

FAMILIES = ("torchvision", "timm", "text encoder", "text decoder", "text encoder-decoder", "image", "audio", "video")
CLASSES = 5

_LONG = 60_000_000
"""``--long`` takes every timm architecture of fewer parameters."""

_SMALL: dict[str, Any] = {
    "vocab_size": 512, "max_position_embeddings": 128, "n_positions": 128, "image_size": 64,
    **dict.fromkeys("hidden_size d_model n_embd dim emb_dim embedding_size output_hidden_size".split(), 64),
    **dict.fromkeys("num_hidden_layers n_layer n_layers num_layers num_decoder_layers".split(), 6),
    **dict.fromkeys("encoder_layers decoder_layers".split(), 6),
    **dict.fromkeys("num_attention_heads n_head n_heads num_heads".split(), 4),
    **dict.fromkeys("encoder_attention_heads decoder_attention_heads".split(), 4),
    "num_key_value_heads": 2, **dict.fromkeys("head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim".split(), 16),
    "qk_head_dim": 32, "q_lora_rank": 32, "kv_lora_rank": 32, "index_head_dim": 32, "index_n_heads": 4,
    **dict.fromkeys("intermediate_size encoder_ffn_dim decoder_ffn_dim d_ff hidden_dim".split(), 128),
    "moe_intermediate_size": 32, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "initializer_range": 0.2, "init_std": 0.2,
}  # fmt: skip
_BARELY = 1e-2
"""Parameters below are made larger: zero-initialised norms and classifiers, layer scales of 1e-6."""
_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_MAMBA = ["linear_attention", "linear_attention", "hybrid"] * 2
_NO_GROUPS = {"num_key_value_heads": 4}
_WINDOWS = {"image_size": 128, "window_size": 4}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": _NO_GROUPS | {"n_group": 2, "topk_group": 1},
    "axk2": _NO_GROUPS,
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "deepseek_v2": _NO_GROUPS,
    "deepseek_v3": _NO_GROUPS | {"n_group": 2, "topk_group": 1},
    "donut-swin": _WINDOWS,
    "efficientnet": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
    "esmc": _NO_GROUPS,
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "gptj": {"rotary_dim": 8},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16, "input_size": 64},
    "levit": {"image_size": 224},
    "lilt": {"hidden_size": 96},
    "luke": {"entity_vocab_size": 100},
    "minicpm3": _NO_GROUPS,
    "mistral4": _NO_GROUPS | {"head_dim": 32},
    "perceiver": {
        "num_latents": 16, "d_latents": 64, "num_self_attends_per_block": 6, "num_cross_attention_heads": 1,
        "image_size": 224,
    },
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 48], "attn_layers": ["local", "lsh"] * 3},
    "shieldgemma2": {"yes_token_index": 3, "no_token_index": 4},
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "t5": {"decoder_start_token_id": 0},
    "vjepa2": {"crop_size": 64, "frames_per_clip": 4, "pred_num_hidden_layers": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": _MAMBA, "attention_head_dim": 32, "attention_hidden_size": 128},
    "zamba2": {"layers_block_type": _MAMBA},
}  # fmt: skip
"""Per model type, the fields that have a shape of their own."""


def names_of(library: str, long: bool, counts_file: Path) -> list[str]:
    """``torchvision:NAME``, ``timm:NAME`` or ``hf:CLASS`` of every model to measure, in the table's order."""
    if library == "torchvision":
        models = import_torchvision("models")
        return [f"torchvision:{name}" for name in (*models.list_models(module=models), *_torchvision_videos())]
    if library == "timm":
        return _timm_names(long, counts_file)
    families = _hf_families()
    return sorted((f"hf:{name}" for name in families), key=lambda name: FAMILIES.index(family_of(name)))


def family_of(name: str) -> str:
    library, _, rest = name.partition(":")
    if library == "torchvision" and rest in _torchvision_videos():
        return "video"
    return _hf_families()[rest] if library == "hf" else library


@cache
def _torchvision_videos() -> list[str]:
    models = import_torchvision("models")
    return list(models.list_models(module=models.video))


def build(name: str) -> nn.Module:
    """The model with random weights, the same in every run, large enough for every layer to show in the logits.

    Raises:
        ImportError: the model needs a library that is not installed.
    """
    library, _, rest = name.partition(":")
    torch.manual_seed(0)
    model = _hugging_face(rest) if library == "hf" else load_model(name)
    if getattr(model, "num_classes", None) == 0:  # timm: weights published without a classifier
        model.reset_classifier(CLASSES)  # type: ignore[operator]
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and parameter.abs().max() < _BARELY:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def _hugging_face(class_name: str) -> nn.Module:
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns about the default configurations
    model_class = getattr(transformers, class_name)
    model: nn.Module = model_class(
        model_class.config_class(**_small_fields(model_class.config_class), num_labels=CLASSES)
    )
    return model


def inputs_of(name: str) -> dict[str, Tensor] | None:
    """Example inputs for the few models whose own library does not declare them; None where exitkit infers them."""
    if name.startswith("hf:PerceiverForImage"):
        return {"inputs": torch.randn(2, 3, 224, 224)}
    if name.startswith("hf:Perceiver"):
        return {"inputs": torch.randint(3, 500, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    if name.startswith("hf:Siglip2"):
        patches, mask = torch.randn(2, 16, 3 * 16 * 16), torch.ones(2, 16, dtype=torch.long)
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.full((2, 2), 4)}
    return None


def _timm_names(long: bool, counts_file: Path) -> list[str]:
    """One model of every model file, the smallest; with ``long``, every architecture under 60M parameters."""
    import timm

    counts = _timm_parameters(timm, counts_file)
    if long:
        return [f"timm:{name}" for name in timm.list_models() if counts[name] < _LONG]
    by_file = defaultdict(list)
    for name in timm.list_models():
        by_file[timm.models.model_entrypoint(name).__module__].append(name)
    return sorted("timm:" + min(names, key=lambda name: (counts[name], name)) for names in by_file.values())


def _timm_parameters(timm: Any, file: Path) -> dict[str, int]:
    """Parameters of every timm architecture, kept in ``file``, since counting takes minutes."""
    if file.exists() and (kept := json.loads(file.read_text()))["timm"] == timm.__version__:
        return dict(kept["parameters"])
    counts = {}
    for name in timm.list_models():
        with torch.device("meta"):
            counts[name] = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
    with replacing(file) as temporary:
        temporary.write_text(json.dumps({"timm": timm.__version__, "parameters": counts}, indent=1))
    return counts


@cache
def _hf_families() -> dict[str, str]:
    """The class name of every text, image, audio and video classifier in transformers, and its family."""
    from transformers.models.auto import modeling_auto as auto

    pairs = auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    decoders = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys()

    def text(kind: str) -> str:
        return "text encoder-decoder" if kind in pairs else "text decoder" if kind in decoders else "text encoder"

    found = {}
    for family, names in (
        (text, auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        (lambda kind: "image", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
        (lambda kind: "audio", auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES),
        (lambda kind: "video", auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES),
    ):
        for kind, classes in names.items():
            found.update(dict.fromkeys(classes if isinstance(classes, tuple) else (classes,), family(kind)))
    return found


def _small_fields(config_class: type[Any]) -> dict[str, Any]:
    """The configuration's own fields, made small, those of nested configurations (a vision tower's) too."""
    default = config_class()
    own = default.to_dict()
    fields = {key: value for key, value in _SMALL.items() if isinstance(own.get(key, ...), int | float | None)}
    if "vocab_size" in own:
        fields |= _SPECIAL_TOKENS
    for key in config_class.sub_configs:
        if (nested := getattr(default, key, None)) is not None:
            fields[key] = {"model_type": nested.model_type, **_small_fields(type(nested))}
    return fields | _OVERRIDES.get(config_class.model_type, {})
