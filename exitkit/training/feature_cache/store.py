"""A table of tensors on disk, written rows at a time: one safetensors file, memory-mapped when it is read."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_FORMAT = "exitkit-features-1"
_ALIGNMENT = 8
_CHUNK = 1 << 24
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


def row_bytes(batch: Mapping[str, Tensor]) -> int:
    """Bytes of one row, given tensors (B, ...) by name."""
    return sum(tensor[0].numel() * tensor.element_size() for tensor in batch.values())


class Writer:
    """A store of ``rows`` rows like those of ``batch``, tensors (B, ...) by name. It is valid once it is finished."""

    def __init__(self, path: Path, batch: Mapping[str, Tensor], rows: int) -> None:
        self.entries: dict[str, Any] = {}
        end = 0
        for name in sorted(batch, key=lambda name: -batch[name].element_size()):  # so that each is aligned to its size
            start, end = end, end + rows * row_bytes({name: batch[name]})
            shape = [rows, *batch[name].shape[1:]]
            self.entries[name] = {"dtype": _NAMES[batch[name].dtype], "shape": shape, "data_offsets": [start, end]}
        self.path = path
        self.begin = len(self._header("0" * 64, 0))

    def write(self, start: int, batch: Mapping[str, Tensor]) -> None:
        """Rows from number ``start`` on. Through the file, not a mapping: a full disk is an OSError here, a crash there."""
        with self.path.open("r+b") as file:
            for name, tensor in batch.items():
                file.seek(self.begin + self.entries[name]["data_offsets"][0] + start * row_bytes({name: tensor}))
                file.write(tensor.cpu().contiguous().view(torch.uint8).numpy().data)

    def finish(self, key: str) -> None:
        """Make the store valid, as the one of ``key`` (64 characters)."""
        header = self._header(key, _checksum(self.path, self.begin, self.entries))
        with self.path.open("r+b") as file:
            file.write(header)

    def _header(self, key: str, checksum: int) -> bytes:
        about = {"format": _FORMAT, "key": key, "crc32": f"{checksum:08x}"}
        text = json.dumps({"__metadata__": about, **self.entries}).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return struct.pack("<Q", len(text)) + text


def read_store(path: Path, key: str) -> dict[str, Tensor] | None:
    """The tensors of the store of ``key``, memory-mapped; None for a missing, damaged or foreign file."""
    with (
        suppress(OSError, SafetensorError, KeyError, ValueError, struct.error),
        safe_open(str(path), framework="pt") as stored,  # first: it refuses a header longer than the file
        path.open("rb") as file,
    ):
        begin = 8 + struct.unpack("<Q", file.read(8))[0]
        entries = json.loads(file.read(begin - 8))
        about = entries.pop("__metadata__")
        ours = (about.get("format"), about.get("key")) == (_FORMAT, key)
        if ours and about["crc32"] == f"{_checksum(path, begin, entries):08x}":
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no iterator
    return None


def _checksum(path: Path, begin: int, entries: Mapping[str, Any]) -> int:
    """Of what the header says of the tensors, and of their bytes, from ``begin`` on."""
    value = zlib.crc32(json.dumps(entries).encode())
    with path.open("rb") as file:
        file.seek(begin)
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value
