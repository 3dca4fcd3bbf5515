"""The command that shows a model's blocks."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from exitkit.cli.options import AsJson, Classes, ModelName, Weights, check_least
from exitkit.common.errors import ArgumentError, ExitkitError


def inspect(
    model: ModelName,
    weights: Weights = None,
    num_classes: Classes = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the input image, for models that do not say")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per text; what a text model costs depends on it")] = None,
    json: AsJson = False,
) -> None:
    """Show where exits can go, and what each stage costs.

    Feature shapes, MACs (ptflops beside them), parameters and memory. exitkit.attach(at=) and bench --at take the numbers and
    the names.
    """
    import exitkit
    from exitkit.cli.sources import load_model
    from exitkit.common.schema import to_json

    check_least(num_classes=num_classes)
    backbone = load_model(model, weights, num_classes)
    example = _image_example(backbone, image_size) if length is None else _text_example(backbone, length)
    found = exitkit.inspect(backbone, example, show=not json)
    if json:
        typer.echo(to_json(found.to_dict()))


def _image_example(backbone: Any, side: int | None) -> Any:
    import torch
    from torch import nn

    from exitkit.surgery.default_inputs import example_for

    if side is None:
        try:
            example_for(backbone)
        except ExitkitError as error:
            raise ArgumentError(
                f"{type(backbone).__name__} does not say what it takes; give the side of its input images, such as "
                "--image-size 32, or call exitkit.inspect(model, example_inputs) in Python for other inputs"
            ) from error
        return None
    if side < 1:
        raise ArgumentError(f"--image-size {side} must be at least 1: the side of the input image in pixels")
    channels = next((m.in_channels for m in backbone.modules() if isinstance(m, nn.Conv2d)), 3)
    return torch.randn(2, channels, side, side)


def _text_example(backbone: Any, length: int) -> Any:
    import torch

    from exitkit.multi_exit.text_length import check_positions
    from exitkit.surgery.default_inputs import example_for

    example = example_for(backbone)
    if not example.text or length < 1:
        raise ArgumentError(f"--length {length} must be at least 1, and the model one that reads tokens")
    check_positions(backbone, length, "--length ")
    positions = torch.arange(length) % example.tensors[0].shape[1]
    return example.spec.batch(tuple(tensor[:1, positions] for tensor in example.tensors))
