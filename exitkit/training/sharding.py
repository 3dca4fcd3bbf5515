"""FSDP2: a model that learns divided among processes, each block gathered where it runs; and its parts in checkpoints."""

from __future__ import annotations

import copy
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import keystr, tree_map, tree_map_with_path

from exitkit.common.errors import ArgumentError, FileError
from exitkit.multi_exit.model import MultiExitModel
from exitkit.surgery.liveness import submodule
from exitkit.training.distributed import asked_for_fsdp
from exitkit.training.freezing import Stages
from exitkit.training.options import Options

if TYPE_CHECKING:
    from accelerate import Accelerator

_FOLDERS = "checkpoint-shards-"
_PART = "in the shards: "


def divides(options: Options, accelerator: Accelerator) -> bool:
    """Whether the model is divided: FSDP was asked for, there are processes to divide it among, and the backbone learns."""
    return options.trains_backbone and accelerator.num_processes > 1 and asked_for_fsdp()


@contextmanager
def divided(
    options: Options, stages: Stages | None, accelerator: Accelerator
) -> Iterator[tuple[Options, Stages | None]]:
    """The options of a copy of the model that is divided among the processes, and its stages; what was given where it is not.

    In the end the weights are back in the model, whole, in every process; after an error it is as it was before. It stays on
    the device where it is; a copy shares its memory until the copy is divided.

    Raises:
        ArgumentError: an option that needs the whole model in each process.
    """
    if stages is None or not divides(options, accelerator):
        yield options, stages
        return
    _check(options)
    model = options.model
    _take_weights_of_main_process(model, accelerator.device)
    twin = copy.deepcopy(model, {id(parameter): _alias(parameter) for parameter in model.parameters()})
    twin.combiners.to(accelerator.device)
    _shard(twin, accelerator, options.mixed_precision)
    theirs = dict(zip(model.parameters(), twin.parameters(), strict=True))
    modules = dict(zip(model.modules(), twin.modules(), strict=True))
    stages = replace(
        stages,
        parameters=tuple(tuple(theirs[parameter] for parameter in stage) for stage in stages.parameters),
        modules=tuple(frozenset(modules[module] for module in stage) for stage in stages.modules),
    )
    of_twin = copy.copy(options)
    of_twin.model = twin
    yield of_twin, stages
    _take_weights_of(twin, model)


def _check(options: Options) -> None:
    refused = {"compile": (True,), "mixed_precision": ("fp16",), "analyse": ("gradient_dominance", "first_exit")}
    for name, values in refused.items():
        if (value := getattr(options, name)) in values:
            raise ArgumentError(
                f"{name}={value!r} needs the whole model in each process, and accelerate launch was asked for FSDP, which "
                "divides it; leave one of them out" + (", or use 'bf16'" if value == "fp16" else "")
            )


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """The same memory as another parameter, in the form that can be divided: contiguous, and no scalar."""
    values = parameter.detach().contiguous()
    return nn.Parameter(values if values.dim() else values.view(1), parameter.requires_grad)


@torch.no_grad()
def _take_weights_of_main_process(model: nn.Module, device: torch.device) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        sent = tensor.to(device).contiguous()
        distributed.broadcast(sent, 0)
        _set(tensor, sent)


@torch.no_grad()
def _take_weights_of(twin: nn.Module, model: nn.Module) -> None:
    own, theirs = ([*one.parameters(), *one.buffers()] for one in (model, twin))
    for tensor, divided_one in zip(own, theirs, strict=True):
        _set(tensor, whole(divided_one).view_as(tensor))


def _set(tensor: Tensor, values: Tensor) -> None:
    """Nothing is written where nothing changes: a buffer may be an expanded one."""
    values = values.to(tensor.device)
    if not torch.equal(tensor, values):
        tensor.copy_(values)


def _shard(model: MultiExitModel, accelerator: Accelerator, precision: str) -> None:
    """Each block by itself; the rest of the backbone and the exits together. Between calls every parameter is divided.

    Under autocast to bf16 parameters are gathered in it: autograd would keep the copies that autocast makes, of all blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    low = torch.bfloat16 if precision == "bf16" else None
    gathered = MixedPrecisionPolicy(low, reduce_dtype=torch.float32 if low else None, cast_forward_inputs=False)
    divide = partial(fully_shard, mesh=mesh, reshard_after_forward=True, mp_policy=gathered)
    for block in _blocks(model):
        divide(block)
    divide(
        model, ignored_params=set(model.combiners.parameters())
    )  # the ensemble is fitted in every process by itself
    for method in ("run_heads", "run_until"):
        register_fsdp_forward_method(model, method)


def _blocks(model: MultiExitModel) -> list[nn.Module]:
    """The backbone's blocks that can be gathered by themselves: nothing outside shares their weights or reads inside them."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    read = [spec.hook.path for spec in model.specs]
    blocks = []
    for path in dict.fromkeys(boundary.call.path for boundary in model.anatomy.blocks):
        block = submodule(model.backbone, path)
        own = Counter(id(parameter) for _, parameter in block.named_parameters(remove_duplicate=False))
        shares = any(uses[parameter] != count for parameter, count in own.items())
        if own and not shares and not any(other.startswith(f"{path}.") for other in read):
            blocks.append(block)
    return blocks


def is_divided(model: nn.Module) -> bool:
    return any(_is_part(parameter) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts that other processes hold; to be called in all of them."""
    gathered: Tensor = tensor.full_tensor() if _is_part(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def _is_part(value: object) -> bool:
    """Without importing DTensor, which a single process never needs."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def write_shards(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A checkpoint's state without the parts of divided tensors, which every process writes to a new folder.

    Its name is in the state as ``shards``, and the sizes of its files as ``shard_bytes``.

    Raises:
        OSError: a process cannot write its parts.
    """
    parts: dict[str, Tensor] = {}

    def taken(path: Any, value: Any) -> Any:
        if not _is_part(value):
            return value
        parts[name := f"{_PART}{keystr(path)}"] = value
        return name

    rest = tree_map_with_path(taken, state)
    if not parts:
        return state
    from accelerate.utils import broadcast_object_list
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = directory / broadcast_object_list([f"{_FOLDERS}{secrets.token_hex(4)}"])[0]
    try:
        # as safetensors: torch's own format is unpickled when it is read, which may run code
        save(parts, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(_reason(error)) from error
    return {**rest, "shards": folder.name, "shard_bytes": _sizes(folder)}


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


def read_shards(
    state: dict[str, Any], directory: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """A checkpoint's state with all of its tensors, divided as the model is now, whatever it was when they were written.

    Raises:
        FileError: the folder of the parts is not there, or damaged.
    """
    mesh = next(
        (getattr(parameter, "device_mesh", None) for parameter in model.parameters() if _is_part(parameter)), None
    )
    if "shards" in state:
        assert directory is not None
        state = _with_parts(state, directory / state["shards"], mesh)
    elif mesh is None:
        return state
    own = model.state_dict()
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = {
        name: None if state[name] is None else {key: _like(own.get(key), value) for key, value in state[name].items()}
        for name in ("weights", "best")
    }
    moments = {
        index: {key: value if key == "step" else _like(learning[index], value) for key, value in values.items()}
        for index, values in state["optimizer"]["state"].items()
        if index < len(learning)
    }
    return {**state, **kept, "optimizer": {**state["optimizer"], "state": moments}}


def _with_parts(state: dict[str, Any], folder: Path, mesh: Any) -> dict[str, Any]:
    from torch.distributed import tensor
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        if _sizes(folder) != state["shard_bytes"]:
            raise ValueError("its files are not those that were written")
        reader = HuggingFaceStorageReader(str(folder))
        stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
        by_rows: Any = partial(tensor.empty, device_mesh=mesh, placements=[tensor.Shard(0)])
        empty = torch.empty if mesh is None else by_rows
        parts = {name: empty(about.size, dtype=about.properties.dtype) for name, about in stored.items()}
        load(parts, storage_reader=reader, no_dist=mesh is None)
    except (CheckpointException, Exception) as error:  # the former is none, and a damaged file raises whatever it may
        raise FileError(
            f"the checkpoint's folder {str(folder)!r} is damaged ({_reason(error)}); start again by resume='never'"
        ) from error
    return tree_map(lambda value: parts.get(value, value) if isinstance(value, str) else value, state)  # type: ignore[no-any-return]


def _like(own: Tensor | None, value: Any) -> Any:
    """A tensor of the checkpoint in the form of the run's own: as a scalar or not, divided or whole."""
    if own is None or not isinstance(value, Tensor):
        return value
    if value.numel() == own.numel() == 1 and value.dim() != own.dim():
        value = value.reshape(own.shape)
    if not _is_part(own) or _is_part(value) or value.shape != own.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)  # type: ignore[attr-defined]


def remove_shards(directory: Path, keep: str | None = None) -> None:
    """The folders of parts, but for the one that the checkpoint names."""
    for folder in directory.glob(f"{_FOLDERS}*"):
        if folder.name != keep:
            shutil.rmtree(folder, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """What went wrong in the first process that failed."""
    failures = list(getattr(error, "failures", {}).values())
    cause = failures[0][0] if failures else error
    return f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), 'no message')}"
