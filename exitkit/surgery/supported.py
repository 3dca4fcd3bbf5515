"""Which models surgery takes: what cannot be cut is refused by name, before anything is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from exitkit.common.errors import NotCapturableError

_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def check_supported(model: nn.Module) -> None:
    """Refuse anything but an eager, unwrapped module with its weights.

    Raises:
        ExitkitError: the first reason found, and what to do about it.
    """
    if not isinstance(model, nn.Module):
        if isinstance(model, Mapping):
            raise NotCapturableError(
                f"model is {type(model).__name__}, perhaps a state dict, not a torch.nn.Module; build the model, load it by "
                "model.load_state_dict(...), and pass the model"
            )
        hint = " (call the class)" if isinstance(model, type) else ""
        raise NotCapturableError(
            f"model={model!r} is not a torch.nn.Module; pass the model object itself, such as "
            f"torchvision.models.resnet50(weights='DEFAULT'){hint}"
        )
    for reason in _REASONS:
        if (found := reason(model)) is not None:
            raise NotCapturableError(f"{type(model).__name__} {found}")


def _wrapped(model: nn.Module) -> str | None:
    if type(model).__name__ in _WRAPPERS:
        return "is a wrapper for several devices; attach to the model inside it (model.module), and wrap what attach returns"
    return None


def _compiled(model: nn.Module) -> str | None:
    if hasattr(model, "_orig_mod"):
        return "is compiled; attach to the module inside it (model._orig_mod), and compile what attach returns"
    if model._compiled_call_impl is not None:
        return "was compiled in place by model.compile(); attach to a fresh model, and compile what attach returns"
    return None


def _scripted(model: nn.Module) -> str | None:
    if isinstance(model, torch.jit.ScriptModule):
        return "is TorchScript, which has no Python modules to read features from; attach to the original model"
    return None


def _exported(model: nn.Module) -> str | None:
    if any(kind.__name__ == "_StatefulGraphModule" for kind in type(model).__mro__):
        return "was made by torch.export, whose modules have no code of their own; attach to the original model"
    return None


def _uninitialized(model: nn.Module) -> str | None:
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        return "has lazy modules without weights yet; run it once on example inputs"
    return None


def _quantized(model: nn.Module) -> str | None:
    for path, module in model.named_modules():
        kind = type(module)
        library = kind.__module__.startswith(("torch.ao.nn.", "torch.nn.quantized", "bitsandbytes."))
        if library and "FloatFunctional" not in kind.__name__:
            return (
                f"has quantised modules ({path or 'itself'} is {kind.__module__}.{kind.__name__}); attach to the "
                "floating-point model"
            )
    return None


def _weightless(model: nn.Module) -> str | None:
    if not any(parameter.is_floating_point() for parameter in model.parameters()):
        return "has no boundary: it has no floating-point parameter, so there is nothing to cut"
    return None


def _inference(model: nn.Module) -> str | None:
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        return "was built under torch.inference_mode(); build or load it outside"
    return None


def _scattered(model: nn.Module) -> str | None:
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        return f"is spread over {', '.join(devices)}; exits need the whole backbone on one device: model.to(device)"
    return None


_REASONS: tuple[Callable[[nn.Module], str | None], ...] = (
    _wrapped,
    _compiled,
    _scripted,
    _exported,
    _uninitialized,
    _quantized,
    _weightless,
    _inference,
    _scattered,
)
