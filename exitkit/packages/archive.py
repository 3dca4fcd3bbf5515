"""The file of a package: a zip of a manifest and one file for each step."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exitkit.common.errors import ArgumentError, FileError
from exitkit.common.files import replacing
from exitkit.packages.manifest import check_format

_MANIFEST = "manifest.json"


def write_archive(path: Path, manifest: dict[str, Any], steps: Sequence[bytes]) -> None:
    """Write all, or leave what was there. Steps are stored uncompressed: weights do not compress."""
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.writestr(_MANIFEST, json.dumps(manifest, indent=1))
        for index, step in enumerate(steps):
            archive.writestr(f"steps/{index}", step)


def read_archive(path: Path) -> tuple[dict[str, Any], list[bytes]]:
    """The manifest and the steps, checked against the checksums in the file.

    Raises:
        ExitkitError: no such file, a damaged or truncated one, or one that exitkit did not write.
    """
    if not path.is_file():
        raise ArgumentError(f"{str(path)!r} does not exist; write a package there with exitkit.export(ee, path)")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            manifest: Any = json.loads(archive.read(_MANIFEST)) if _MANIFEST in names else None
            check_format(manifest, str(path))
            return manifest, [archive.read(f"steps/{index}") for index in range(len(manifest["steps"]))]
    except (zipfile.BadZipFile, KeyError, EOFError, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileError(
            f"{str(path)!r} is damaged or cut short ({type(error).__name__}: {error}); copy or export it again"
        ) from error
