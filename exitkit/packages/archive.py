"""The file of a package: a zip of a manifest, its digest, and one file for each step, none of them compressed.

======================  =============================================================================================
``manifest.json``       everything but the steps' code (:mod:`exitkit.packages.manifest`), the digest of each step included
``manifest.sha256``     SHA-256 of ``manifest.json``
``steps/0``, …          the steps, as torch programs, compiled ones or ONNX graphs
======================  =============================================================================================
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from exitkit.common.errors import FileError
from exitkit.common.files import replacing
from exitkit.packages.manifest import Manifest, read_manifest, to_text

_MANIFEST, _DIGEST = "manifest.json", "manifest.sha256"


def write_archive(path: Path, manifest: Manifest, steps: Sequence[bytes]) -> None:
    """Write all, or leave what was there. Steps are stored uncompressed: weights do not compress."""
    signed = [replace(entry, sha256=_sha256(step)) for entry, step in zip(manifest.steps, steps, strict=True)]
    text = to_text(replace(manifest, steps=tuple(signed))).encode()
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.writestr(_MANIFEST, text)
        archive.writestr(_DIGEST, _sha256(text))
        for index, step in enumerate(steps):
            archive.writestr(f"steps/{index}", step)


def read_archive(path: Path) -> tuple[Manifest, list[bytes]]:
    """The manifest and the steps, checked against their digests; nothing is unpacked that is larger than the file.

    Raises:
        FileError: a damaged or truncated file, or one that exitkit did not write.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_sizes(archive, os.path.getsize(path))
            text = archive.read(_MANIFEST) if _MANIFEST in archive.namelist() else b"null"
            manifest = read_manifest(text, str(path))
            if archive.read(_DIGEST) != _sha256(text).encode():
                raise FileError(f"{str(path)!r} is damaged: its manifest was changed; copy or export it again")
            steps = [archive.read(f"steps/{index}") for index in range(len(manifest.steps))]
    except FileError:
        raise
    except Exception as error:  # zipfile raises a dozen kinds on a damaged file
        raise FileError(
            f"{str(path)!r} is damaged or cut short ({type(error).__name__}: {str(error)[:200]}); copy or export it again"
        ) from error
    for index, (entry, step) in enumerate(zip(manifest.steps, steps, strict=True)):
        if entry.sha256 != _sha256(step):
            raise FileError(f"{str(path)!r} is damaged: step {index} was changed; copy or export it again")
    return manifest, steps


def _check_sizes(archive: zipfile.ZipFile, available: int) -> None:
    """Refuse what would be larger in memory than on the disk: exitkit compresses nothing."""
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise FileError(f"{archive.filename!r} has compressed parts, which exitkit never writes; export it again")
    if sum(entry.file_size for entry in entries) > available:
        raise FileError(f"{archive.filename!r} declares more content than it has; copy or export it again")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
