"""The C++ compiler that AOTInductor builds with, looked at before it is used."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from exitkit.common.errors import ExitkitError

_USES_LIBRARY = b"#include <locale>\nconst void* used() { return &std::locale::classic(); }\n"


@cache
def check_compiler() -> None:
    """Refuse a compiler that copies the C++ library into what it builds, once a process.

    torch has that library loaded; a compiled step with a copy of its own mixes both up and ends the process when it is loaded.
    A compiler that is missing, or does not work, is left to Inductor, which says so.

    Raises:
        ExitkitError: such a compiler.
    """
    if sys.platform != "linux":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler  # Inductor takes long to import

    with tempfile.TemporaryDirectory(prefix="exitkit-") as folder:
        built = Path(folder) / "used.so"
        try:
            compiler = get_cpp_compiler()
            command = [compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(built)]
            subprocess.run(command, input=_USES_LIBRARY, check=True, capture_output=True)
        except (OSError, RuntimeError, subprocess.CalledProcessError):
            return
        shared = re.search(rb"lib(std)?c\+\+\.so", built.read_bytes())
    if not shared:
        raise ExitkitError(
            f"optimize=True builds with {compiler!r}, which copies the C++ library into every file, as -static-libstdc++ "
            "does; beside torch's own, this ends the process. Set the environment variable CXX to another, such as g++"
        )
