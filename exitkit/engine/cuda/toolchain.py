"""What AOTInductor needs to build for a GPU: the toolkit's headers, and a libcuda to link against."""

from __future__ import annotations

import ctypes.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch.utils import cpp_extension

from exitkit.common.errors import ExitkitError


@cache
def prepare() -> None:
    """Find both where torch does not, once a process.

    Raises:
        ArgumentError: there are no headers of CUDA.
    """
    home = next((folder for folder in _toolkits() if (folder / "include" / "cuda.h").is_file()), None)
    if home is None:
        raise ExitkitError(
            f"optimize=True compiles for the GPU and needs the headers of CUDA {torch.version.cuda}, which are in none of the "
            "usual places; pip install nvidia-cuda-nvcc nvidia-cuda-runtime, or set CUDA_HOME"
        )
    if cpp_extension.CUDA_HOME is None or not (Path(cpp_extension.CUDA_HOME) / "include" / "cuda.h").is_file():
        cpp_extension.CUDA_HOME = str(home)  # read at every build; a wrapper of nvcc may have misled it
    library = _libcuda(home)
    if library is not None:
        os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(library), os.environ.get("LIBRARY_PATH")]))


def _toolkits() -> Iterator[Path]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name])
    compiler = shutil.which("nvcc")
    if compiler:
        yield Path(compiler).resolve().parent.parent
    yield from sorted(Path(torch.__file__).parent.parent.glob("nvidia/cu*"), reverse=True)
    yield from sorted(Path("/usr/local").glob("cuda*"), reverse=True)


def _libcuda(home: Path) -> Path | None:
    """A folder with a libcuda.so, which the driver's package alone may not have: it has a libcuda.so.1."""
    stub = next(
        (folder for folder in (home / "lib64" / "stubs", home / "lib" / "stubs") if (folder / "libcuda.so").exists()),
        None,
    )
    if stub is not None:
        return stub
    found = ctypes.util.find_library("cuda")
    places = [Path(folder) / str(found) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if found]
    places += list(Path("/usr/lib").glob("*-linux-gnu/libcuda.so.1"))
    driver = next((place for place in places if place.is_file()), None)
    if driver is None:
        return None
    folder = Path(tempfile.mkdtemp(prefix="exitkit-libcuda-"))
    (folder / "libcuda.so").symlink_to(driver.resolve())
    return folder
