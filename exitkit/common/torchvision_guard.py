"""The one place through which exitkit reaches torchvision.

torchvision's wheel is linked against the CUDA libraries. Beside a CPU build of torch its operators do
not load, and ``import torchvision`` (with it timm and parts of transformers) fails with
"operator torchvision::nms does not exist". Declaring the two missing schemas is enough for its models,
transforms and datasets; only detection operators stay unavailable.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from exitkit.common.errors import ExitkitError

if TYPE_CHECKING:
    import torch

_MISSING_OPERATORS = ("nms", "qnms")


class _BeforeTorchvision(MetaPathFinder):
    """Finds nothing; when torchvision is looked for, by whomever, its missing operators are declared first."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision":
            make_torchvision_importable()
        return None


def make_torchvision_importable_when_asked() -> None:
    """Nothing is looked at, and torch is not imported, before torchvision is."""
    if "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _BeforeTorchvision())


@functools.cache
def make_torchvision_importable() -> torch.library.Library | None:
    """Declare torchvision's operators where its binary does not fit this torch; warn when doing so.

    Costs nothing on a matching installation: only a CPU torch beside a torchvision that is not a CPU
    build is looked at more closely. The library is returned (and cached) because it dies with its handle.
    """
    import torch

    # looking for torchvision below must not come back here
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _BeforeTorchvision)]
    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return None
    if not torch.__version__.endswith("+cpu") or version.endswith("+cpu") or _operators_load():
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in _MISSING_OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    warnings.warn(
        f"torchvision {version} was not built for torch {torch.__version__}: its compiled operators (nms) are "
        "unavailable. Models, transforms and datasets work. Install a matching pair to silence this.",
        stacklevel=2,
    )
    return library


def _operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    import torch

    for binary in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(binary))
        except OSError:
            return False
    return True


def import_torchvision(submodule: str = "", needed_for: str = "this") -> ModuleType:
    """Import ``torchvision`` or one of its submodules, with a clear error when it is not installed."""
    make_torchvision_importable()
    try:
        return importlib.import_module(f"torchvision.{submodule}" if submodule else "torchvision")
    except ImportError as error:
        raise ExitkitError(f"{needed_for} needs torchvision: pip install 'exitkit[torchvision]' ({error})") from error
