"""CIFAR ResNets, and early exits on real images with real pretrained weights where they are present."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

import exitkit
from exitkit import ExitkitError
from exitkit.models import cifar_resnet

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def images_of(data: Path, pack: str, count: int) -> TensorDataset:
    """The first images of a pack, normalised as the pretrained weights want them."""
    spec = importlib.util.spec_from_file_location("unpack", data / "unpack.py")
    assert spec is not None
    assert spec.loader is not None
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    pixels, labels = unpack.load_pack(data / "cifar10" / pack)
    scaled = torch.from_numpy(np.ascontiguousarray(pixels[:count])).float() / 255
    return TensorDataset(
        ((scaled - MEAN) / STD).permute(0, 3, 1, 2), torch.from_numpy(labels[:count].astype(np.int64))
    )


@pytest.fixture(scope="module")
def test_images(real_data: Path) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(images_of(real_data, "test.xz", 1000), batch_size=250)


def weights_of(data: Path, depth: int) -> Path:
    return data / "weights" / f"cifar10_resnet{depth}.safetensors"


def answers(model: torch.nn.Module, loader: DataLoader[tuple[Tensor, ...]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.eval()(images) for images, _ in loader])


# the architecture ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_parameter_counts_of_the_paper(depth: int, millions: float) -> None:
    """He et al. 2015, table 6."""
    count = sum(parameter.numel() for parameter in cifar_resnet(depth).parameters()) / 1e6
    assert abs(count - millions) < 0.05 if depth == 110 else round(count, 2) == millions


@pytest.mark.parametrize("depth", [0, 2, 7, 18, 21, 49, -4])
def test_impossible_depths_are_refused(depth: int) -> None:
    with pytest.raises(ExitkitError, match=f"depth={depth} is not 6n \\+ 2; use 20"):
        cifar_resnet(depth)


def test_the_smallest_depth_and_other_classes() -> None:
    assert cifar_resnet(8, num_classes=7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_shortcuts_subsample_and_pad_with_zeros() -> None:
    """Option A: with the residual branch silenced, a block is its shortcut."""
    block = cifar_resnet(20).layer2[0].eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 8, 8)
    expected = torch.zeros(2, 32, 4, 4)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


def test_inputs_of_a_cifar_resnet_are_inferred() -> None:
    ee = exitkit.attach(cifar_resnet(8), every=1)
    assert [exit_.name for exit_ in ee.exits] == ["layer1.0", "layer2.0", "backbone"]


# weights -------------------------------------------------------------------------------------------------------------


def test_weights_are_loaded(tmp_path: Path) -> None:
    model = cifar_resnet(8)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    loaded = cifar_resnet(8, weights=tmp_path / "w.safetensors").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_half_precision_weights_are_cast(tmp_path: Path) -> None:
    half = {name: value.half() for name, value in cifar_resnet(8).state_dict().items() if value.is_floating_point()}
    save_file(half, tmp_path / "w.safetensors")
    model = cifar_resnet(8, weights=tmp_path / "w.safetensors")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.conv1.weight, half["conv1.weight"].float())


def test_a_missing_weights_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExitkitError, match=r"weights=.*none\.safetensors' cannot be read"):
        cifar_resnet(20, weights=tmp_path / "none.safetensors")


def test_a_truncated_weights_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(cifar_resnet(8).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ExitkitError, match=r"w\.safetensors' cannot be read as safetensors"):
        cifar_resnet(8, weights=path)


@pytest.mark.parametrize(("depth", "classes", "key"), [(14, 10, r"layer1\.1"), (8, 5, r"linear\.weight")])
def test_weights_of_another_network_are_refused(tmp_path: Path, depth: int, classes: int, key: str) -> None:
    save_file(cifar_resnet(depth, classes).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ExitkitError, match=rf"(?s)do not fit CifarResNet.*{key}"):
        cifar_resnet(8, weights=tmp_path / "w.safetensors")


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    state = cifar_resnet(8).state_dict()
    del state["linear.bias"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ExitkitError, match=r"(?s)do not fit CifarResNet.*linear\.bias"):
        cifar_resnet(8, weights=tmp_path / "w.safetensors")


# real weights, real images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [20, 56])
def test_real_weights_fit_completely(real_data: Path, depth: int) -> None:
    model, file = cifar_resnet(depth, weights=weights_of(real_data, depth)), load_file(weights_of(real_data, depth))
    own = model.state_dict()
    assert file.keys() | {name for name in own if name.endswith("num_batches_tracked")} == own.keys()
    assert all(torch.equal(own[name], value.to(own[name].dtype)) for name, value in file.items())


def test_the_pretrained_network_is_as_good_as_published(
    real_data: Path, test_images: DataLoader[tuple[Tensor, ...]]
) -> None:
    logits = answers(cifar_resnet(20, weights=weights_of(real_data, 20)), test_images)
    labels = torch.cat([labels for _, labels in test_images])
    assert (logits.argmax(-1) == labels).double().mean() >= 0.91


def test_ztw_on_real_images(real_data: Path, test_images: DataLoader[tuple[Tensor, ...]]) -> None:
    """A short run: every exit learns, and the pretrained network is the one it was."""
    backbone = cifar_resnet(20, weights=weights_of(real_data, 20))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    some = Subset(test_images.dataset, range(400))
    own = answers(backbone, DataLoader(some, batch_size=200))
    ee = exitkit.attach(backbone, at=["layer1.2", "layer2.2", "layer3.1"], method="ztw")
    train = DataLoader(images_of(real_data, "train_0.xz", 1000), batch_size=40, shuffle=True)
    exitkit.Trainer(ee, epochs=1, lr=2e-3, show_progress=False).fit(train)
    outputs = exitkit.collect(ee, DataLoader(some, batch_size=200))
    accuracy = outputs.accuracy()
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert torch.allclose(outputs.log_probs[:, -1], own.log_softmax(-1), atol=1e-5)
    assert (accuracy[:-1] > 0.2).all()
    assert (np.diff(accuracy) > 0).all()
    assert outputs.curve().no_limit().accuracy == pytest.approx(accuracy[-1])
    assert outputs.curve().at_budget(0.75).accuracy > accuracy[0]
