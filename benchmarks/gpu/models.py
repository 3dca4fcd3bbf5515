"""Small models with exits on the GPU, and batches for them: what first contact looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import exitkit

GPU = torch.device("cuda", 0)
Make = Callable[[int], Any]
"""From a number of samples to a batch."""


def images(side: int, dtype: torch.dtype, samples: int, device: torch.device = GPU) -> Tensor:
    return torch.randn(samples, 3, side, side, device=device, dtype=dtype)


def cases(names: Sequence[str]) -> Iterator[tuple[str, nn.Module, Make, torch.dtype]]:
    """Small models of every kind: name, model, batches, dtype. All of them where no name is given."""
    import timm
    import torchvision
    from transformers import BertConfig, BertForSequenceClassification

    def text(samples: int) -> dict[str, Tensor]:
        ids = torch.randint(1, 900, (samples, 13 if samples % 2 else 32), device=GPU)
        mask = torch.ones_like(ids)
        mask[: samples // 2, ids.shape[1] // 2 :] = 0
        return {"input_ids": ids, "attention_mask": mask}

    config = BertConfig(
        vocab_size=1000, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256
    )
    whole, half = torch.float32, torch.bfloat16
    found: list[tuple[str, Callable[[], nn.Module], Make, torch.dtype]] = [
        ("resnet18", lambda: torchvision.models.resnet18(num_classes=10), partial(images, 64, whole), whole),
        ("bert", lambda: BertForSequenceClassification(config), text, whole),
        ("tnt", lambda: timm.create_model("tnt_s_patch16_224", num_classes=10), partial(images, 224, whole), whole),
        (
            "vit-bf16",
            lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10),
            partial(images, 224, half),
            half,
        ),
    ]
    for name, model, make, dtype in found:
        if not names or name in names:
            yield name, model(), make, dtype


def engines(
    model: nn.Module, make: Make, dtype: torch.dtype, optimize: bool = True
) -> tuple[exitkit.Engine, exitkit.Engine]:
    """The engine in plain torch, and as recorded steps."""
    ee = attached(model, make, dtype)
    taus = exitkit.collect(ee, [make(64)]).scores()[:, :-1].double().quantile(0.6, dim=0).tolist()
    plain = exitkit.compile(ee, taus)
    return plain, exitkit.compile(ee, taus, optimize=True) if optimize else plain


def attached(model: nn.Module, make: Make, dtype: torch.dtype) -> exitkit.MultiExitModel:
    torch.manual_seed(0)
    example = make(2)
    device = next(iter(example.values())).device if isinstance(example, dict) else example.device
    return exitkit.attach(model.eval().to(device, dtype), example, at_cost=[0.35, 0.7], method="sdn", head="1L").eval()
