"""exitkit: early exits for pretrained classifiers, with the saved compute made real."""

from exitkit._torchvision import make_torchvision_importable as _make_torchvision_importable

_make_torchvision_importable()

from exitkit import evaluation, models, training  # noqa: E402
from exitkit.attach import attach  # noqa: E402
from exitkit.errors import ExitkitError  # noqa: E402
from exitkit.evaluation import ExitOutputs, choose_threshold, collect  # noqa: E402
from exitkit.inspect import inspect  # noqa: E402
from exitkit.methods import GPF, PBEE, SDN, ZTW, BranchyNet, Method  # noqa: E402
from exitkit.model import MultiExitModel, MultiExitOutput, detach  # noqa: E402
from exitkit.packages import export, load  # noqa: E402
from exitkit.preprocessing import ImagePreprocessing, TextPreprocessing  # noqa: E402
from exitkit.runtime import Engine, Prediction, compile, time_exits  # noqa: E402
from exitkit.training import Trainer  # noqa: E402

__all__ = [
    "GPF",
    "PBEE",
    "SDN",
    "ZTW",
    "BranchyNet",
    "Engine",
    "ExitOutputs",
    "ExitkitError",
    "ImagePreprocessing",
    "Method",
    "MultiExitModel",
    "MultiExitOutput",
    "Prediction",
    "TextPreprocessing",
    "Trainer",
    "attach",
    "choose_threshold",
    "collect",
    "compile",
    "detach",
    "evaluation",
    "export",
    "inspect",
    "load",
    "models",
    "time_exits",
    "training",
]
