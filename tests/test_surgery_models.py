"""Surgery on real architectures with random weights: blocks by name, and both views of the model equal bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import exitkit
from exitkit.surgery.boundaries import find_boundaries
from exitkit.surgery.capturing import capture, logits_of
from exitkit.surgery.partition import Partition, partition_at
from exitkit.surgery.verification import verify

torchvision_models = pytest.importorskip("torchvision.models")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

CLASSES = 5
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "num_labels": CLASSES,
    "initializer_range": 0.3,
}


@dataclass(frozen=True)
class Spec:
    """``side``: of the images the model is attached with; None lets attach infer the inputs."""

    build: Callable[[], nn.Module]
    first: str
    last: str
    count: int
    side: int | None = None
    every: int = 1


def _torchvision(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision_models.get_model(name, weights=None, num_classes=CLASSES, **kwargs)


def _timm(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, num_classes=CLASSES, **kwargs)


def _hf(model: str, config: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**kwargs))


_LAYERS = "encoder.layers.encoder_layer_"
_ALBERT = "albert.encoder.albert_layer_groups.0.albert_layers.0"
_DISTILBERT = {
    "vocab_size": 99, "dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 40, "max_position_embeddings": 64,
    "num_labels": CLASSES, "initializer_range": 0.3,
}  # fmt: skip
_MODERNBERT = {
    **TEXT, "local_attention": 8, "pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2,
    "sep_token_id": 2,
}  # fmt: skip
_HF_VIT = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 40, "image_size": 32,
    "patch_size": 8, "num_labels": CLASSES, "initializer_range": 0.3,
}  # fmt: skip

MODELS = {
    "resnet18": Spec(_torchvision("resnet18"), "layer1.0", "layer4.1", 8),
    "resnet50": Spec(_torchvision("resnet50"), "layer1.0", "layer4.2", 16, 64, every=3),
    "vgg16_bn": Spec(_torchvision("vgg16_bn"), "features.2", "classifier.5", 14, 32, every=3),
    "densenet121": Spec(_torchvision("densenet121"), "features.denseblock1", "features.denseblock4", 4, 64),
    "mobilenet_v2": Spec(_torchvision("mobilenet_v2"), "features.1", "features.17", 17, 64, every=2),
    "efficientnet_b0": Spec(_torchvision("efficientnet_b0"), "features.1.0", "features.7.0", 16, 64, every=2),
    "convnext_tiny": Spec(_torchvision("convnext_tiny"), "features.1.0", "features.7.2", 18, 64, every=3),
    "swin_t": Spec(_torchvision("swin_t"), "features.1.0", "features.7.1", 12, 64, every=2),
    "vit_b_16": Spec(_torchvision("vit_b_16", image_size=32), f"{_LAYERS}0", f"{_LAYERS}11", 12, every=4),
    "timm_vit_tiny": Spec(_timm("vit_tiny_patch16_224", img_size=32), "blocks.0", "blocks.11", 12, every=2),
    "timm_convnext_atto": Spec(_timm("convnext_atto"), "stages.0.blocks.0", "stages.3.blocks.1", 12, 64, every=2),
    "bert": Spec(
        _hf("BertForSequenceClassification", "BertConfig", **TEXT), "bert.encoder.layer.0", "bert.encoder.layer.3", 4
    ),
    "distilbert": Spec(
        _hf("DistilBertForSequenceClassification", "DistilBertConfig", **_DISTILBERT),
        "distilbert.transformer.layer.0",
        "distilbert.transformer.layer.3",
        4,
    ),
    "albert": Spec(
        _hf("AlbertForSequenceClassification", "AlbertConfig", embedding_size=16, **TEXT), _ALBERT, f"{_ALBERT}@3", 4
    ),
    "modernbert": Spec(
        _hf("ModernBertForSequenceClassification", "ModernBertConfig", **_MODERNBERT),
        "model.layers.0",
        "model.layers.3",
        4,
    ),
    "hf_vit": Spec(_hf("ViTForImageClassification", "ViTConfig", **_HF_VIT), "vit.layers.0", "vit.layers.3", 4),
}


@dataclass(frozen=True, repr=False)
class Case:
    spec: Spec
    backbone: nn.Module
    ee: exitkit.MultiExitModel
    partition: Partition

    def __repr__(self) -> str:
        return repr(self.ee)

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """Batches by argument name; for text, at two lengths, each with a full and with a padded mask."""
        names = [str(key) for key in self.ee.example.spec.keys]
        generator = torch.Generator().manual_seed(size)
        if names == ["attention_mask", "input_ids"]:
            return [_text(size, length, padded, generator) for length in (7, 19) for padded in (False, True)]
        return [{names[0]: torch.randn(size, *self.ee.example.tensors[0].shape[1:], generator=generator)}]

    def call(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        """``model`` on ``batch``, called as it was attached."""
        args, kwargs = self.ee.example.spec.call(tuple(batch.values()))
        return model(*args, **kwargs)

    def staged(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """The features and the logits from the stages joined again."""
        return self.partition.run(list(batch.values()))


def _text(size: int, length: int, padded: bool, generator: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(3, 99, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(size):
            mask[row, 2 + row % (length - 2) :] = 0
    return {"attention_mask": mask, "input_ids": ids * mask}


def _awaken(model: nn.Module, images: Tensor | None) -> nn.Module:
    """Random weights of which every layer can be felt in the logits, in eval mode."""
    for name, parameter in model.named_parameters():
        if "layer_scale" in name or name.endswith(".gamma"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif not parameter.count_nonzero():
            nn.init.normal_(parameter, std=0.1)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    if norms and images is not None:
        with torch.no_grad():
            model.train()(images)
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    spec = MODELS[request.param]
    images = None if spec.side is None else torch.randn(2, 3, spec.side, spec.side)
    backbone = _awaken(spec.build(), torch.randn(4, 3, spec.side or 64, spec.side or 64))
    ee = exitkit.attach(backbone, images, every=spec.every, method="sdn")
    return Case(spec, backbone, ee.eval(), ee.partition())


@pytest.fixture(autouse=True)
def _exact_inference() -> Iterator[None]:
    """No gradients, and no ``nn.MultiheadAttention`` fast path: a fused kernel that rounds differently."""
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        yield
    torch.backends.mha.set_fastpath_enabled(True)


def test_the_random_model_tells_its_inputs_apart(case: Case) -> None:
    """Else all of the equalities below would hold of constants."""
    for batch in case.batches(2):
        first, second = logits_of(case.call(case.backbone, batch))
        assert (first - second).abs().max() > 1e-3


def test_blocks_are_named(case: Case) -> None:
    names = [boundary.name for boundary in case.ee.anatomy.blocks]
    assert (names[0], names[-1], len(names)) == (case.spec.first, case.spec.last, case.spec.count)


@pytest.mark.parametrize("size", [1, 5])
def test_stages_joined_again_equal_the_backbone(case: Case, size: int) -> None:
    for batch in case.batches(size):
        expected = logits_of(case.call(case.backbone, batch))
        assert torch.equal(case.staged(batch)[-1], expected), {name: t.shape for name, t in batch.items()}


@pytest.mark.parametrize("size", [1, 5])
def test_features_read_by_hooks_equal_the_stages_features(case: Case, size: int) -> None:
    for batch in case.batches(size):
        features, staged = case.call(case.ee, batch).features, case.staged(batch)[:-1]
        assert len(features) == len(staged) == len(case.ee.boundaries)
        for boundary, feature, other in zip(case.ee.boundaries, features, staged, strict=True):
            assert torch.equal(feature, other), boundary.name


@pytest.mark.parametrize("size", [1, 5])
def test_last_exit_is_the_backbone(case: Case, size: int) -> None:
    for batch in case.batches(size):
        expected = logits_of(case.call(case.backbone, batch))
        assert torch.equal(case.call(case.ee, batch).logits[-1], expected)


def test_every_exit_answers_with_finite_logits(case: Case) -> None:
    for batch in case.batches(3):
        logits = case.call(case.ee, batch).logits
        assert [tuple(exit_.shape) for exit_ in logits] == [(3, CLASSES)] * len(case.ee.exits)
        assert all(exit_.isfinite().all() for exit_ in logits)


@pytest.mark.parametrize("case", ["resnet18", "swin_t", "timm_convnext_atto", "distilbert", "albert"], indirect=True)
def test_cut_at_every_boundary_at_once(case: Case) -> None:
    """Not at the blocks alone: ``verify`` raises where a stage or a hook differs from the backbone."""
    example = case.ee.example
    captured = capture(case.backbone, example.spec.batch(example.tensors))
    boundaries = find_boundaries(captured).boundaries
    assert len(verify(captured, boundaries, partition_at(captured, boundaries))) >= case.spec.count


@pytest.mark.parametrize("case", ["resnet50"], indirect=True)
def test_resnet50_every_third_block(case: Case) -> None:
    assert [boundary.name for boundary in case.ee.boundaries] == [
        "layer1.2", "layer2.2", "layer3.1", "layer3.4", "layer4.1"
    ]  # fmt: skip


@pytest.mark.parametrize("case", ["albert"], indirect=True)
def test_albert_shares_one_layer_called_four_times(case: Case) -> None:
    assert [boundary.name for boundary in case.ee.anatomy.blocks] == [_ALBERT, *(f"{_ALBERT}@{i}" for i in (1, 2, 3))]
    assert [spec.hook.rank for spec in case.ee.specs] == [0, 1, 2]


@pytest.mark.parametrize("case", ["densenet121"], indirect=True)
def test_densenet_is_not_cut_inside_a_dense_block(case: Case) -> None:
    assert [b.name for b in case.ee.anatomy.boundaries if ".denselayer" in b.name] == []


@pytest.mark.parametrize("case", ["swin_t"], indirect=True)
def test_swin_features_are_channels_last(case: Case) -> None:
    assert {boundary.layout for boundary in case.ee.boundaries} == {"channels_last"}


@pytest.mark.parametrize("case", ["vit_b_16", "timm_vit_tiny", "bert", "albert", "hf_vit"], indirect=True)
def test_class_token_is_read_where_the_backbone_reads_it(case: Case) -> None:
    assert {head.body.pool.kind for head in case.ee.classifiers} == {"first"}
