"""exitkit: early exits for pretrained classifiers, with the saved compute made real."""

import importlib
from typing import TYPE_CHECKING, Any

from exitkit.common.torchvision_guard import make_torchvision_importable as _make_torchvision_importable

_make_torchvision_importable()

from exitkit import calibration, evaluation, models, training  # noqa: E402
from exitkit.calibration.risk_control import choose_threshold  # noqa: E402
from exitkit.common.allocator import keep_memory  # noqa: E402
from exitkit.common.errors import (  # noqa: E402
    ArgumentError,
    DivergedError,
    ExitkitError,
    FileError,
    HubError,
    NotCapturableError,
)
from exitkit.engine import Engine, Prediction, compile, time_exits  # noqa: E402
from exitkit.evaluation import ExitOutputs, collect  # noqa: E402
from exitkit.methods.policy import ExitPolicy, Guarantee  # noqa: E402
from exitkit.methods.presets import GPF, PBEE, SDN, ZTW, BranchyNet, Method  # noqa: E402
from exitkit.multi_exit.attaching import attach, detach  # noqa: E402
from exitkit.multi_exit.inspection import inspect  # noqa: E402
from exitkit.multi_exit.model import MultiExitModel  # noqa: E402
from exitkit.multi_exit.output import MultiExitOutput  # noqa: E402
from exitkit.multi_exit.preprocessing import ImagePreprocessing, TextPreprocessing  # noqa: E402
from exitkit.packages import export, load  # noqa: E402
from exitkit.retrofitting import Retrofit, retrofit  # noqa: E402
from exitkit.training import Trainer  # noqa: E402

if TYPE_CHECKING:
    from exitkit import rl

__all__ = [
    "GPF",
    "PBEE",
    "SDN",
    "ZTW",
    "ArgumentError",
    "BranchyNet",
    "DivergedError",
    "Engine",
    "ExitOutputs",
    "ExitPolicy",
    "ExitkitError",
    "FileError",
    "Guarantee",
    "HubError",
    "ImagePreprocessing",
    "Method",
    "MultiExitModel",
    "MultiExitOutput",
    "NotCapturableError",
    "Prediction",
    "Retrofit",
    "TextPreprocessing",
    "Trainer",
    "attach",
    "calibration",
    "choose_threshold",
    "collect",
    "compile",
    "detach",
    "evaluation",
    "export",
    "inspect",
    "keep_memory",
    "load",
    "models",
    "retrofit",
    "rl",
    "time_exits",
    "training",
]


def __getattr__(name: str) -> Any:
    """Rooms that few need are imported when they are asked for."""
    if name in ("analysis", "rl"):
        return importlib.import_module(f"exitkit.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
