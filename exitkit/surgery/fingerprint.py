"""What a backbone is: its weights by name, shape and value, and its blocks. Precision and device are no part of it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import zip_longest

import torch
from torch import Tensor, nn

from exitkit.common.errors import ArgumentError
from exitkit.surgery.boundaries import Boundary

_PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)


def tensor_lines(backbone: nn.Module) -> dict[str, str]:
    """Every floating-point entry of the state dict by name: its shape and three digests, ``64×3×7×7 1a2b3c4d5e6f7a8b …``.

    They are of all its values in float32, in float16 and in bfloat16. Converting a model from one of them to another keeps
    at least one, so that its weights are recognised in half precision. About 1.3 s for 100 million parameters.

    Raises:
        ExitkitError: the backbone is on the meta device.
    """
    return {
        name: " ".join((shape_text(value.shape), *(_digest(value.to(precision)) for precision in _PRECISIONS)))
        for name, value in _floating(backbone)
    }


def block_lines(blocks: Iterable[Boundary]) -> dict[str, str]:
    """The shape of every block's feature by the block's name: what the graph says beyond the weights."""
    return {block.name: shape_text(block.shape) for block in blocks}


def weights_digest(backbone: nn.Module, without: Collection[str] = ()) -> str:
    """One digest of all the weights but those named, in their own precision: any other value is noticed.

    Raises:
        ExitkitError: the backbone is on the meta device.
    """
    lines = [
        f"{shape_text(value.shape)} {_digest(value)}" for name, value in _floating(backbone) if name not in without
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def fingerprint_of(backbone: nn.Module) -> str:
    """Digests of all the weights in float32, float16 and bfloat16: for :func:`same_weights`."""
    lines = [(name, *line.split()) for name, line in tensor_lines(backbone).items()]
    columns = ("\n".join(f"{name} {shape} {digests[i]}" for name, shape, *digests in lines) for i in range(3))
    return " ".join(hashlib.sha256(column.encode()).hexdigest()[:16] for column in columns)


def same_weights(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same weights, in the same precision or one converted to the other's."""
    return any(first == second for first, second in zip(one.split(), other.split(), strict=True))


def first_difference(saved: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """Where ``found`` first differs from the ``saved`` lines of a backbone, in words; None where they agree.

    Names and shapes come before values: a layer too many explains more than the values it displaces.
    """
    for was, is_ in zip_longest(saved.items(), found.items(), fillvalue=("", "")):
        there, here = _name_and_shape(*was), _name_and_shape(*is_)
        if there != here:
            return f"{there} there is {here}"
    for name, line in saved.items():
        digests, others = line.split()[1:], found[name].split()[1:]
        if digests and not any(one == other for one, other in zip(digests, others, strict=False)):
            return f"{_name_and_shape(name, line)} has other values"
    return None


def shape_text(shape: tuple[int, ...]) -> str:
    """``64×3×7×7``; ``scalar`` for no dimensions."""
    return "×".join(map(str, shape)) or "scalar"


def _floating(backbone: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, value in backbone.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point():
            if value.is_meta:
                raise ArgumentError(
                    f"{name!r} is on the meta device and has no values; load the backbone's weights first"
                )
            yield name, value.detach()


def _digest(tensor: Tensor) -> str:
    """Of all its values, in order."""
    values = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(values.data, digest_size=8).hexdigest()


def _name_and_shape(name: str, line: str) -> str:
    return f"'{name} {line.partition(' ')[0]}'" if name else "nothing"
