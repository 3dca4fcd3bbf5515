"""Backbones in the forms that users have them: adapters, compiled, half precision, other memory, tied or derived weights."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import exitkit
from tests.toy import TinyNet, all_equal, images, staged


class Tied(nn.Module):
    """One block object called four times, and a classifier whose weight is the stem's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))] * 4)
        self.linear = nn.Linear(8, 8)
        self.linear.weight = self.stem.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.linear(x)
        return logits


def _weight_normed() -> nn.Module:
    model = TinyNet()
    parametrizations.weight_norm(model.linear)
    parametrizations.spectral_norm(model.blocks[1].conv1)
    return model


def _pruned() -> nn.Module:
    model = TinyNet()
    prune.l1_unstructured(model.blocks[0].conv1, "weight", 0.5)
    return model


DERIVED: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "parametrised": (_weight_normed, images()),
    "pruned": (_pruned, images()),
    "tied": (Tied, torch.randn(2, 8)),
}


@pytest.mark.parametrize("form", DERIVED)
@pytest.mark.parametrize("head", ["auto", "tail"])
def test_derived_and_tied_weights(form: str, head: str, tmp_path: Path) -> None:
    make, x = DERIVED[form]
    torch.manual_seed(0)
    model = make().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ee = exitkit.attach(model, x, head=head).eval()
    with torch.no_grad():
        output = ee(x)
        assert torch.equal(output.logits[-1], model(x))
    assert all_equal(staged(ee.partition(), x), [*output.features, output.logits[-1]])
    ee.save_pretrained(tmp_path)
    again = exitkit.MultiExitModel.from_pretrained(model, tmp_path, x).eval()
    assert all_equal(again(x).logits, ee(x).logits)
    assert all(torch.equal(before[name], tensor) for name, tensor in exitkit.detach(ee).state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("head", ["auto", "tail"])
def test_other_precisions(dtype: torch.dtype, head: str) -> None:
    model, x = TinyNet().to(dtype).eval(), images().to(dtype)
    ee = exitkit.attach(model, x, head=head, method="sdn").eval()
    assert {parameter.dtype for parameter in ee.added_parameters()} == {dtype}
    output = ee(x)
    assert {logits.dtype for logits in output.logits} == {dtype}
    assert torch.equal(output.logits[-1], model(x))
    assert all(torch.isfinite(logits).all() for logits in output.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["ztw", exitkit.ZTW(ensemble="additive", ensemble_final=True)])
def test_converted_after_attaching(dtype: torch.dtype, method: str | exitkit.methods.presets.Method) -> None:
    model = TinyNet().eval()
    ee = exitkit.attach(model, images(), method=method).eval().to(dtype)
    x = images(4).to(dtype)
    with torch.no_grad():
        output, expected = ee(x), exitkit.compile(ee, threshold=0.0)(x)
    assert all(torch.isfinite(logits).all() for logits in output.logits)
    torch.testing.assert_close(expected.logits, output.logits[0].float(), check_dtype=False)


def test_channels_last_stays_channels_last() -> None:
    model = TinyNet().to(memory_format=torch.channels_last).eval()
    x = images(4).contiguous(memory_format=torch.channels_last)
    ee = exitkit.attach(model, x).eval()
    with torch.no_grad():
        output = ee(x)
        assert torch.equal(output.logits[-1], model(x))
    assert all(feature.is_contiguous(memory_format=torch.channels_last) for feature in output.features)
    assert all(
        parameter.is_contiguous(memory_format=torch.channels_last)
        for parameter in model.parameters()
        if parameter.dim() == 4
    )


def test_exits_compile_with_the_backbone() -> None:
    ee = exitkit.attach(TinyNet(), images()).eval()
    compiled = torch.compile(ee, backend="eager")
    for x in (images(4), images(4) * 2, images(5)):
        assert all_equal(compiled(x).logits, ee(x).logits)


def test_compiled_training_gives_the_same_gradients() -> None:
    ee = exitkit.attach(TinyNet(), images())
    ee.eval()  # without dropout
    grads = []
    for model in (ee, torch.compile(ee, backend="aot_eager")):
        ee.zero_grad()
        sum(logits.logsumexp(1).sum() for logits in model(images(4)).logits).backward()
        grads.append([parameter.grad.clone() for parameter in ee.parameters() if parameter.grad is not None])
    assert len(grads[0]) == len(grads[1]) > len(list(ee.backbone.parameters()))
    torch.testing.assert_close(grads[0], grads[1])


def test_a_block_that_was_compiled_before() -> None:
    model = TinyNet().eval()
    model.blocks[1].compile(backend="eager")
    ee = exitkit.attach(model, images()).eval()
    assert torch.equal(ee(images(3)).logits[-1], model(images(3)))


def test_two_models_that_share_modules() -> None:
    first, second = TinyNet().eval(), TinyNet().eval()
    second.stem, second.blocks = first.stem, first.blocks
    one, other = (exitkit.attach(model, images(), every=every).eval() for model, every in ((first, 1), (second, 2)))
    for _ in range(2):
        assert torch.equal(one(images()).logits[-1], first(images()))
        assert torch.equal(other(images()).logits[-1], second(images()))
    assert not any(module._forward_hooks for module in first.modules())


def test_low_rank_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=40, num_labels=3
    )
    base = transformers.BertForSequenceClassification(config)
    model = peft.get_peft_model(
        deepcopy(base), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
    )
    ee = exitkit.attach(model, every=1, head="tail").eval()
    assert [exit_.name for exit_ in ee.exits[:-1]] == [f"base_model.model.bert.encoder.layer.{i}" for i in range(3)]
    ids = torch.randint(1, 99, (3, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(ee(input_ids=ids).logits[-1], model(input_ids=ids).logits)
    sum(logits.sum() for logits in ee(input_ids=ids).logits).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("lora_A" in name for name in trained)
    assert not any("base_layer" in name for name in trained)
    ee.save_pretrained(tmp_path)
    again = exitkit.MultiExitModel.from_pretrained(model, tmp_path).eval()
    assert all_equal(again(input_ids=ids).logits, ee(input_ids=ids).logits)
