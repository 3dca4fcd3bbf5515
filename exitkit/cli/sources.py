"""Models by name: ``torchvision:NAME``, ``timm:NAME``, ``hf:NAME_OR_DIR`` or ``package.module:function``."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from exitkit.common.errors import ArgumentError, ExitkitError, FileError, near_match, unknown_name
from exitkit.common.torchvision_guard import import_torchvision
from exitkit.models.cifar_resnets import load_weights
from exitkit.multi_exit.saving.hub import refuse_local_path

PRETRAINED = "pretrained"
_DEFAULT = "DEFAULT"


def load_model(name: str, weights: str | None = None, num_classes: int | None = None, seed: int = 0) -> nn.Module:
    """Build the model called ``name``.

    Args:
        name: ``torchvision:resnet50``, ``timm:vit_tiny_patch16_224``, ``hf:DIR`` (or a hub name), or
            ``package.module:function``, which is called without arguments (or with ``num_classes``).
        weights: a safetensors or ``.pth`` file of a state dict, ``"pretrained"`` for the library's own, a name of
            torchvision's (``"IMAGENET1K_V1"``), or None for random ones. ``hf:`` models bring their own.
        num_classes: size of the classifier, where it is not the library's default.
        seed: of random weights.

    Raises:
        ArgumentError: an unknown source or name, a missing library, or weights that do not fit.
    """
    source, colon, rest = name.partition(":")
    if not colon or not rest:
        raise ArgumentError(
            f"--model {name!r} is not SOURCE:NAME; use torchvision:resnet50, timm:resnet18, hf:NAME_OR_DIR or "
            "package.module:function"
        )
    if weights == PRETRAINED and source not in _LIBRARIES:
        raise ArgumentError(
            f"--weights {PRETRAINED} is for models of a library, and --model {name!r} returns its own weights; leave it out, "
            "or give a state-dict file"
        )
    torch.manual_seed(seed)
    named = _named_weights(source, weights)
    options = {} if num_classes is None else {"num_classes": num_classes}
    try:
        library = _LIBRARIES.get(source)
        model = _function(source, rest, options) if library is None else library(rest, named, options)
    except ExitkitError:
        raise
    except Exception as error:  # whatever a library or a user's function raises on these options
        offline = "; without a network give a state-dict file as --weights, or none" if named else ""
        raise ArgumentError(
            f"--model {name!r} cannot be built with these options: {type(error).__name__}: {error}{offline}"
        ) from error
    if weights is not None and named is None and weights != PRETRAINED:
        _load_file(model, Path(weights))
    return model


def _named_weights(source: str, weights: str | None) -> str | None:
    """The name of weights that the library brings; None where they are a file, or none at all."""
    if weights == PRETRAINED:
        return _DEFAULT
    if weights is None or source != "torchvision" or os.path.exists(weights):
        return None
    return weights if Path(weights).name == weights and not Path(weights).suffix else None


def load_pretrained(name: str, weights: str | None, num_classes: int | None) -> tuple[nn.Module, int | None]:
    """The model with its own classes, for :func:`exitkit.attach` to replace; with ``num_classes`` if ``weights`` have these.

    Arguments and errors are those of :func:`load_model`. Beside the model is the ``num_classes`` that it was built with, which
    builds it again.
    """
    try:
        return load_model(name, weights), None
    except ArgumentError:
        if num_classes is None or weights in (None, PRETRAINED):
            raise
        return load_model(name, weights, num_classes), num_classes


def is_code(name: str) -> bool:
    """Whether a model is a function that is imported and called, other than one of exitkit's own."""
    source = name.partition(":")[0]
    return source not in _LIBRARIES and not source.startswith("exitkit.")


def _torchvision(name: str, weights: str | None, options: dict[str, Any]) -> nn.Module:
    models = import_torchvision("models", f"--model torchvision:{name}")
    _known(name, [*models.list_models(module=models), *models.list_models(module=models.video)], "torchvision")
    known = [one.name for one in models.get_model_weights(name)]
    if weights not in (None, _DEFAULT, *known):
        raise unknown_name("--weights", weights, [PRETRAINED, *known], "Or give a state-dict file.")
    model: nn.Module = models.get_model(name, weights=weights, **options)
    return model


def _timm(name: str, weights: str | None, options: dict[str, Any]) -> nn.Module:
    timm = _library("timm", "timm")
    _known(name.partition(".")[0], timm.list_models(), "timm")
    model: nn.Module = timm.create_model(name, pretrained=weights is not None, **options)
    return model


def _hugging_face(name: str, weights: str | None, options: dict[str, Any]) -> nn.Module:
    """A text or image classifier from a folder or the hub; a folder with a config alone gives random weights."""
    if not os.path.isdir(name):
        refuse_local_path(name)
    transformers = _library("transformers", "transformers")
    extra = {"num_labels": options["num_classes"]} if options else {}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **extra)
    except (OSError, ValueError) as error:
        there = (Path(name) / "config.json").is_file()
        wrong = "cannot be loaded" if there else "is neither a folder with a config.json nor on the hub"
        raise ArgumentError(f"--model hf:{name} {wrong}: {error}") from error
    kinds = {
        transformers.AutoModelForSequenceClassification: transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        transformers.AutoModelForImageClassification: transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    }
    kind = next((auto for auto, known in kinds.items() if type(config) in known), None)
    if kind is None:
        raise ArgumentError(
            f"--model hf:{name} is a {config.model_type}, which transformers has no text or image classifier for"
        )
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        model: nn.Module = kind.from_config(config)
        return model
    try:
        loaded: nn.Module = kind.from_pretrained(name, config=config)
    except (OSError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"--model hf:{name} cannot be loaded: {error}") from error
    # heads have the backbone's precision, and Adam's steps overflow in float16
    return loaded.float() if next(loaded.parameters()).dtype == torch.float16 else loaded


def _function(module: str, function: str, options: dict[str, Any]) -> nn.Module:
    sources = "sources are torchvision:, timm:, hf:, or an importable package.module:function"
    found = import_from_here(module, f"--model {module}:{function}", sources)
    make = getattr(found, function, None)
    if make is None:
        near = near_match(function, [name for name, value in vars(found).items() if callable(value)])
        raise ArgumentError(f"--model {module}:{function}: module {module!r} has no {function!r}.{near}")
    taken = inspect.signature(make).parameters.values()
    if options and not any(one.name in options or one.kind == one.VAR_KEYWORD for one in taken):
        raise ArgumentError(
            f"--model {module}:{function} takes no num_classes, and num_classes={options['num_classes']} is asked for; let "
            "the function take it, and build a last layer of so many outputs"
        )
    model = make(**options)
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"--model {module}:{function} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def import_from_here(
    module: str, argument: str, remedy: str = "name a module that is installed, or that lies in this folder"
) -> ModuleType:
    """A module by its name, of the current folder too.

    Raises:
        ArgumentError: there is none, or it cannot be imported; ``argument`` asked for it, and ``remedy`` is what else may be.
    """
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ArgumentError(f"{argument} cannot be imported: {error}; {remedy}") from error
    finally:
        sys.path.pop(0)


def _load_file(model: nn.Module, path: Path) -> None:
    if not os.path.isfile(path):
        wrong = "is a folder" if os.path.isdir(path) else "does not exist"
        raise ArgumentError(
            f"--weights {str(path)!r} {wrong}; give a state-dict file, or 'pretrained' for a library's own"
        )
    if path.suffix == ".safetensors":
        load_weights(model, path)
        return
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what its unpickler raises, with advice on options that are not the user's here
        raise FileError(
            f"--weights {str(path)!r} cannot be read as a state dict ({type(error).__name__}); give what "
            "torch.save(model.state_dict(), path) wrote, or a .safetensors file"
        ) from error
    try:
        model.load_state_dict(state)
    except Exception as error:  # keys and shapes, or no dict at all
        raise ArgumentError(
            f"--weights {str(path)!r} cannot be loaded into {type(model).__name__}: {error}"
        ) from error


def _library(name: str, extra: str) -> Any:
    import_torchvision(needed_for=name) if name == "timm" else None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExitkitError(f"this model needs {name}: pip install 'exitkit[{extra}]' ({error})") from error


def _known(name: str, names: list[str], library: str) -> None:
    if name not in names:
        raise unknown_name(f"{library} model", name, names)


_LIBRARIES: dict[str, Callable[[str, str | None, dict[str, Any]], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _hugging_face,
}
"""What builds a model of each library by its name, the name of its weights and options; any other source is a function."""
