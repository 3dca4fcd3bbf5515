"""exitkit: early exits for pretrained classifiers, and compute that is really saved."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from exitkit.common.torchvision_guard import make_torchvision_importable_when_asked

if TYPE_CHECKING:
    from exitkit import analysis, calibration, evaluation, models, rl, serving, training
    from exitkit.calibration.risk_control import choose_threshold
    from exitkit.common.allocator import keep_memory
    from exitkit.common.errors import (
        ArgumentError,
        DivergedError,
        ExitkitError,
        FileError,
        HubError,
        NotCapturableError,
    )
    from exitkit.engine import Engine, Prediction, compile, time_exits
    from exitkit.evaluation import ExitOutputs, collect
    from exitkit.methods.policy import ExitPolicy, Guarantee
    from exitkit.methods.presets import GPF, PBEE, SDN, ZTW, BranchyNet, Method
    from exitkit.multi_exit.attaching import attach, detach
    from exitkit.multi_exit.inspection import inspect
    from exitkit.multi_exit.model import MultiExitModel
    from exitkit.multi_exit.output import MultiExitOutput
    from exitkit.multi_exit.preprocessing import ImagePreprocessing, TextPreprocessing
    from exitkit.packages import export, load
    from exitkit.retrofitting import Retrofit, retrofit
    from exitkit.training import Trainer

__version__ = "0.2.0"

make_torchvision_importable_when_asked()

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
    "analysis",
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
    "serving",
    "time_exits",
    "training",
]


_ROOMS = ["analysis", "calibration", "evaluation", "models", "rl", "serving", "training"]
_HOMES = {
    "choose_threshold": "exitkit.calibration.risk_control",
    "keep_memory": "exitkit.common.allocator",
    "ArgumentError": "exitkit.common.errors",
    "DivergedError": "exitkit.common.errors",
    "ExitkitError": "exitkit.common.errors",
    "FileError": "exitkit.common.errors",
    "HubError": "exitkit.common.errors",
    "NotCapturableError": "exitkit.common.errors",
    "Engine": "exitkit.engine",
    "Prediction": "exitkit.engine",
    "compile": "exitkit.engine",
    "time_exits": "exitkit.engine",
    "ExitOutputs": "exitkit.evaluation",
    "collect": "exitkit.evaluation",
    "ExitPolicy": "exitkit.methods.policy",
    "Guarantee": "exitkit.methods.policy",
    "GPF": "exitkit.methods.presets",
    "PBEE": "exitkit.methods.presets",
    "SDN": "exitkit.methods.presets",
    "ZTW": "exitkit.methods.presets",
    "BranchyNet": "exitkit.methods.presets",
    "Method": "exitkit.methods.presets",
    "attach": "exitkit.multi_exit.attaching",
    "detach": "exitkit.multi_exit.attaching",
    "inspect": "exitkit.multi_exit.inspection",
    "MultiExitModel": "exitkit.multi_exit.model",
    "MultiExitOutput": "exitkit.multi_exit.output",
    "ImagePreprocessing": "exitkit.multi_exit.preprocessing",
    "TextPreprocessing": "exitkit.multi_exit.preprocessing",
    "export": "exitkit.packages",
    "load": "exitkit.packages",
    "Retrofit": "exitkit.retrofitting",
    "retrofit": "exitkit.retrofitting",
    "Trainer": "exitkit.training",
}
"""Where each public name is: what one needs is imported when it is first used, so that the command line is there at once."""


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"exitkit.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'exitkit' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
