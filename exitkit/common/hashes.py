"""Content hashes: which samples a split holds, so that calibration on training samples is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exitkit.common.batches import checked, split_batch
from exitkit.common.errors import ArgumentError


def content_hashes(loader: Iterable[Any]) -> Tensor:
    """(N,) int64: a hash of every sample's input tensors, as :func:`exitkit.collect` records them.

    Give it the training data *without* augmentation and in the form that is collected: an image that is cropped, padded
    or normalised in another way has other bytes, and so another hash. Texts may be padded otherwise: what their
    ``attention_mask`` leaves out does not count.

    Raises:
        ExitkitError: an empty loader, or inputs without tensors.
    """
    return torch.cat([hash_samples(split_batch(batch)[0]) for batch in checked(loader, "loader")])


def hash_samples(inputs: Any) -> Tensor:
    """(B,) int64: a hash of each sample over all tensors in ``inputs``, which are batch first; padding of texts left out."""
    tensors = [tensor for tensor in _tensors(inputs) if tensor.dim() > 0]
    if not tensors:
        raise ArgumentError(f"inputs are {type(inputs).__name__} without any tensor; there is nothing to hash")
    batch, mask = len(tensors[0]), _mask(inputs)
    parts = [_rows(tensor, mask) for tensor in tensors if len(tensor) == batch]
    digests = (
        hashlib.blake2b(b"".join(part[sample].tobytes() for part in parts), digest_size=8) for sample in range(batch)
    )
    joined = b"".join(digest.digest() for digest in digests)
    return torch.from_numpy(np.frombuffer(joined, np.int64).copy())


def _mask(inputs: Any) -> NDArray[np.bool_] | None:
    """(B, T): which tokens of texts are no padding; None of anything else."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return (mask != 0).cpu().numpy() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _rows(tensor: Tensor, mask: NDArray[np.bool_] | None) -> list[NDArray[np.uint8]]:
    """Each sample's bytes; without those of padding, where there is a value for each token."""
    rows = tensor.detach().cpu().contiguous().reshape(len(tensor), -1).view(torch.uint8).numpy()
    if mask is None or tensor.shape[:2] != mask.shape:
        return list(rows)
    return [tokens[kept] for tokens, kept in zip(rows.reshape(*mask.shape, -1), mask, strict=True)]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def digest(value: Any) -> str:
    """SHA-256 of plain values: tensors, arrays, mappings, sequences, numbers, texts, bytes and None.

    Dtypes, shapes and order count; of anything else the type alone. Files carry it beside their content, so that one that was
    damaged on the way is noticed. It is no signature: who can change a file can change its digest.
    """
    content = hashlib.sha256()
    _add(content, value)
    return content.hexdigest()


def _add(content: hashlib._Hash, value: Any) -> None:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        content.update(f"tensor {value.dtype} {tuple(value.shape)}:".encode())
        content.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, bytes):
        content.update(f"bytes {len(value)}:".encode())
        content.update(value)
    elif isinstance(value, Mapping | tuple | list):
        items = value.items() if isinstance(value, Mapping) else value
        content.update(f"{len(value)}:".encode())
        for item in items:
            _add(content, item)
    else:
        text = repr(value).encode() if value is None or isinstance(value, bool | int | float | str) else b""
        content.update(f"{type(value).__name__} {len(text)}:".encode() + text)
