"""What a command looks at, and says, before it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exitkit.common.console import make_console
from exitkit.common.errors import ExitkitError

if TYPE_CHECKING:
    from exitkit.cli.data.split import Split

INTERRUPTED = 130
"""The exit status of a command that Ctrl-C ended."""


def say_if_random(model: str, weights: str | None) -> None:
    """Only of libraries' models: a function may load weights of its own, and Hugging Face's bring theirs."""
    if weights is None and model.startswith(("torchvision:", "timm:")):
        make_console().print("note: no --weights, so the backbone has random weights")


def say_what_is_lost(split: Split) -> None:
    """Texts that are cut, before anything is trained on them."""
    if split.note:
        make_console().print(f"note: {split.note}")


def data_example(backbone: Any, loader: Any, pairs: bool = False) -> Any:
    """Two samples of the data for a model that does not declare its inputs; None for one that does.

    ``pairs``: the data are pairs of texts, which a model may tell apart by an input that it does not declare.
    """
    import torch

    from exitkit.common.batches import split_batch
    from exitkit.surgery.default_inputs import example_for

    try:
        declared = example_for(backbone)
    except ExitkitError:
        inputs, _ = split_batch(next(iter(loader)))
        return inputs[:2] if isinstance(inputs, torch.Tensor) else {key: value[:2] for key, value in inputs.items()}
    if not pairs or "token_type_ids" not in split_batch(next(iter(loader)))[0]:
        return None
    named = dict(zip(declared.spec.keys, declared.tensors, strict=True))
    return {**named, "token_type_ids": torch.zeros_like(named["input_ids"])}
