"""Frozen classifiers with real weights, their data in three parts, and smaller networks beside them: for ``retrofit.py``."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar10 import BLACK
from cifar10 import load as load_cifar
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from exitkit.common.batches import split_batch
from exitkit.common.files import replacing
from exitkit.models import cifar_resnet
from exitkit.surgery.capturing import logits_of
from exitkit.surgery.inputs import call_on

Way = tuple[list[str], list[str], str]
"""A configuration of one's own choice: boundaries, heads and method."""


@dataclass(frozen=True)
class Task:
    """One row of the benchmark.

    Attributes:
        train: what exits learn from.
        calibration: what nothing has seen, for the guarantee.
        untouched: what nothing has seen, for the check of the promise.
        alternatives: smaller networks by name.
        by_hand: three configurations of our own choice.
        max_drop: the promise.
    """

    model: nn.Module
    train: DataLoader[Any]
    calibration: DataLoader[Any]
    untouched: DataLoader[Any]
    by_hand: tuple[Way, Way, Way]
    alternatives: dict[str, nn.Module] = field(default_factory=dict)
    max_drop: float = 0.01


class Shifted(Dataset[Any]):
    """CIFAR images, randomly flipped and shifted by up to 4 pixels, black coming in at the border."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = F.pad(images - BLACK, (4, 4, 4, 4)) + BLACK
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        top, left = torch.randint(0, 9, (2,)).tolist()
        image = self.images[number, :, top : top + 32, left : left + 32]
        return (image.flip(-1) if torch.rand(()) < 0.5 else image), self.labels[number]


def cifar10(data: Path, out: Path) -> Task:
    """ResNet-56 against ResNet-20; 50,000 training images, 2,500 + 2,500 test images."""
    weights = data / "weights"
    train = Shifted(*load_cifar(out / "cifar10" / "cifar10_train.npz", 50_000))
    test = TensorDataset(*load_cifar(out / "cifar10" / "cifar10_test.npz", 5_000))
    return Task(
        cifar_resnet(56, weights=weights / "cifar10_resnet56.safetensors"),
        DataLoader(train, 128, shuffle=True),
        *_halves(test, 250),
        by_hand=(
            (["layer1.1"], ["branch-2"], "sdn"),
            (["layer1.1", "layer2.1"], ["branch-2", "branch-1"], "sdn"),
            (["layer1.8", "layer2.8"], ["2L-256", "2L-256"], "ztw"),
        ),
        alternatives={"ResNet-20": cifar_resnet(20, weights=weights / "cifar10_resnet20.safetensors")},
    )


class Resized(nn.Module):
    """A network that takes images of its own side out of larger ones."""

    def __init__(self, model: nn.Module, side: int) -> None:
        super().__init__()
        self.model, self.side = model, side

    def forward(self, images: Tensor) -> Tensor:
        smaller = F.interpolate(images, (self.side, self.side), mode="bilinear", antialias=True)
        logits: Tensor = self.model(smaller)
        return logits


_TEN = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]


def imagenette(data: Path, out: Path) -> Task:
    """EfficientNet-Lite2 on its ten classes against Lite1 and Lite0; 600 training images, 150 + 150 others."""

    def lite(number: int) -> nn.Module:
        import timm

        name = f"tf_efficientnet_lite{number}"
        model: Any = timm.create_model(name)
        stored = load_file(data / "weights" / f"imagenet_timm_{name}.safetensors")
        model.load_state_dict({key: value.float() for key, value in stored.items()})
        model.classifier = _some_classes(model.classifier)
        made: nn.Module = model.eval()
        return made

    train, test = (_photos(data / "imagenette" / part, 260, out) for part in ("train", "val"))
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    return Task(
        lite(2),
        DataLoader(train, 32, shuffle=True),
        *_halves(Subset(test, order.tolist()), 50),
        by_hand=(
            (["blocks.4.1"], ["2L-256"], "sdn"),
            (["blocks.3.2"], ["branch-1"], "sdn"),
            (["blocks.3.2", "blocks.4.3"], ["2L-256", "2L-256"], "ztw"),
        ),
        alternatives={"Lite1": Resized(lite(1), 240), "Lite0": Resized(lite(0), 224)},
        max_drop=0.05,
    )


def _some_classes(layer: nn.Linear) -> nn.Linear:
    smaller = nn.Linear(layer.in_features, len(_TEN))
    with torch.no_grad():
        smaller.weight.copy_(layer.weight[_TEN])
        smaller.bias.copy_(layer.bias[_TEN])
    return smaller


def _photos(folder: Path, side: int, out: Path) -> TensorDataset:
    """Photos as tensors, made once: the shorter side to ``side / 0.875``, the centre, mean and deviation 0.5."""
    path = out / f"imagenette-{folder.name}.safetensors"
    if not path.exists():
        from PIL import Image
        from torchvision import transforms

        prepare = transforms.Compose(
            [
                transforms.Resize(round(side / 0.875), transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(side),
                transforms.ToTensor(),
                transforms.Normalize(0.5, 0.5),
            ]
        )
        classes = sorted(item.name for item in folder.iterdir() if item.is_dir())
        files = [(file, label) for label, name in enumerate(classes) for file in sorted((folder / name).iterdir())]
        images = torch.stack([prepare(Image.open(file).convert("RGB")) for file, _ in files])
        _save(path, {"images": images, "labels": torch.tensor([label for _, label in files])})
    stored = load_file(path)
    return TensorDataset(stored["images"], stored["labels"])


def pneumonia(data: Path, out: Path) -> Task:
    """MobileNetV2 with a new last layer on chest X-rays; 3,500 to learn from, 600 + 590 others of the same kind."""
    import timm

    with np.load(data / "medical" / "pneumoniamnist.npz") as arrays:
        images = torch.from_numpy(arrays["train_images"]).float()[:, None] / 255
        labels = torch.from_numpy(arrays["train_labels"].astype(np.int64)).reshape(-1)
    images = F.interpolate((images - 0.45) / 0.225, (96, 96), mode="bilinear").expand(-1, 3, -1, -1)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    every = TensorDataset(images, labels)
    model: Any = timm.create_model("mobilenetv2_100", pad_type="same")
    stored = load_file(data / "weights" / "imagenet_timm_mobilenetv2_100_pad_same.safetensors")
    model.load_state_dict({key: value.float() for key, value in stored.items()}, strict=False)
    model.reset_classifier(2)
    train = Subset(every, order[:3_500].tolist())
    loader = DataLoader(train, 64, shuffle=True)
    trained(model, loader, out / "pneumonia-mobilenetv2.safetensors", _last_layer)
    return Task(
        model.eval(),
        loader,
        *_halves(Subset(every, order[3_500:].tolist()), 100),
        by_hand=(
            (["blocks.2.2"], ["2L-256"], "sdn"),
            (["blocks.3.3"], ["2L-256"], "sdn"),
            (["blocks.2.2", "blocks.4.2"], ["2L-256", "2L-256"], "ztw"),
        ),
    )


@torch.no_grad()
def _features(model: nn.Module, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    body: Any = model
    found = [(body.forward_head(body.forward_features(x), pre_logits=True), y) for x, y in loader]
    return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])


def _last_layer(model: nn.Module, loader: DataLoader[Any]) -> None:
    """Train the new layer alone, on features that are computed once."""
    torch.manual_seed(0)
    layer: Any = model.eval().get_submodule("classifier")
    features, labels = _features(model, loader)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, weight_decay=1e-2)
    for _ in range(60):
        for rows in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(layer(features[rows]), labels[rows]).backward()
            optimizer.step()


class Texts(Dataset[Any]):
    """Texts with labels; tokens are made by :func:`_tokens` for a batch at once."""

    def __init__(self, rows: list[tuple[str, int]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[str, int]:
        return self.rows[number]


def sst2(data: Path, out: Path) -> Task:
    """MiniLM-L6 fine-tuned on SST-2 against its first three layers; exits learn from 6,000 of its 12,000 sentences."""
    rows = read_texts(data / "text" / "sst2_train.tsv")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:20_000].tolist()
    return _text("sst2", data, out, [rows[number] for number in order], 2, 48, tuned=12_000, learned=6_000)


def agnews(data: Path, out: Path) -> Task:
    """MiniLM-L6 fine-tuned on AG News against its first three layers; 5,000 texts, those of the test part for the promise."""
    rows = read_texts(data / "text" / "agnews_train.tsv")[:5_000] + read_texts(data / "text" / "agnews_test.tsv")
    return _text("agnews", data, out, rows, 4, 64, tuned=5_000, learned=5_000)


def _text(
    name: str, data: Path, out: Path, rows: list[tuple[str, int]], classes: int, length: int, tuned: int, learned: int
) -> Task:
    """The models are fine-tuned on the first ``tuned`` rows, exits learn from the first ``learned``."""
    from transformers import AutoTokenizer

    source = data / "weights" / "minilm_l6"
    tokenizer = AutoTokenizer.from_pretrained(source)

    def tokens(batch: list[tuple[str, int]]) -> dict[str, Tensor]:
        texts, labels = zip(*batch, strict=True)
        made = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return {
            "input_ids": made["input_ids"],
            "attention_mask": made["attention_mask"],
            "labels": torch.tensor(labels),
        }

    def loader(count: int) -> DataLoader[Any]:
        return DataLoader(Texts(rows[:count]), 32, shuffle=True, collate_fn=tokens)

    models = {}
    for layers in (6, 3):
        models[layers] = minilm(source, classes, layers)
        trained(models[layers], loader(tuned), out / f"{name}-{layers}-layers.safetensors", fine_tune)
    ids = tokenizer([text for text, _ in rows], truncation=True, max_length=length)["input_ids"]
    known = {tuple(one) for one in ids[:tuned]}
    rest = Texts(
        [row for row, one in zip(rows, ids, strict=True) if tuple(one) not in known]
    )  # some texts occur twice
    return Task(
        models[6],
        loader(learned),
        *_halves(rest, 100, tokens),
        by_hand=(
            (["bert.encoder.layer.2"], ["1L"], "sdn"),
            (["bert.encoder.layer.1", "bert.encoder.layer.3"], ["1L", "1L"], "ztw"),
            (["bert.encoder.layer.2", "bert.encoder.layer.3"], ["2L-256", "2L-256"], "sdn"),
        ),
        alternatives={"first 3 layers": models[3]},
    )


def read_texts(path: Path) -> list[tuple[str, int]]:
    with path.open(newline="", encoding="utf-8") as file:
        read = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row[0], int(row[1])) for row in read if len(row) > 1 and row[1].isdigit()]


def minilm(source: Path, classes: int, layers: int, seed: int = 0) -> nn.Module:
    """The pretrained network's first layers, with a classifier that the seed draws."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    model: Any = AutoModelForSequenceClassification.from_pretrained(source, num_labels=classes, dtype=torch.float32)
    model.bert.encoder.layer = model.bert.encoder.layer[:layers]
    model.config.num_hidden_layers = layers
    return model.eval()  # type: ignore[no-any-return]


def fine_tune(model: nn.Module, loader: DataLoader[Any], seed: int = 0) -> None:
    """Two epochs of AdamW at 5e-5, linearly to 0."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01)
    epochs = 2
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for batch in loader:
            inputs, labels = split_batch(batch)
            logits = logits_of(call_on(model, inputs))
            optimizer.zero_grad()
            F.cross_entropy(logits, torch.as_tensor(labels)).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def trained(
    model: nn.Module, loader: DataLoader[Any], path: Path, train: Callable[[nn.Module, DataLoader[Any]], None]
) -> None:
    """Train once; later runs read the weights."""
    if path.exists():
        model.load_state_dict(load_file(path))
        return
    train(model, loader)
    _save(path, {name: value.contiguous().clone() for name, value in model.state_dict().items()})


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    with replacing(path) as temporary:
        save_file(tensors, temporary)


def _halves(data: Dataset[Any], batch: int, collate: Any = None) -> tuple[DataLoader[Any], DataLoader[Any]]:
    count = len(data)  # type: ignore[arg-type]
    first, second = Subset(data, range(count // 2)), Subset(data, range(count // 2, count))
    return DataLoader(first, batch, collate_fn=collate), DataLoader(second, batch, collate_fn=collate)


TASKS: dict[str, Callable[[Path, Path], Task]] = {
    "cifar10": cifar10,
    "imagenette": imagenette,
    "sst2": sst2,
    "agnews": agnews,
    "pneumonia": pneumonia,
}
