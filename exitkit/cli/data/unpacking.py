"""Arrays that may be larger in memory than on the disk: their sizes are looked at before they are unpacked."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from exitkit.common.errors import FileError

_SMALL, _INFLATED = 2**30, 200
"""Of an .npz: what may be inflated in any case, in bytes, and how many times its size larger ones may become."""


def check_inflation(path: Path) -> None:
    """Refuse a file that would be far larger in memory than on the disk."""
    with zipfile.ZipFile(path) as archive:
        declared = sum(entry.file_size for entry in archive.infolist())
    if declared > _SMALL and declared > _INFLATED * os.path.getsize(path):
        raise FileError(
            f"{str(path)!r} would take {declared / 2**30:.1f} GiB, over {_INFLATED} times its size; write it "
            "uncompressed, with numpy.savez, if that is right"
        )
