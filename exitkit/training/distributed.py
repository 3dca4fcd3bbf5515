"""One process or several: devices, seeds, and each process's part of the data."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from exitkit.common.batches import check_iterable
from exitkit.common.errors import ArgumentError, ExitkitError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
_FSDP, _FSDP_VERSION = "ACCELERATE_USE_FSDP", "FSDP_VERSION"
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "FSDP_OFFLOAD_PARAMS": "parameters on the CPU (--fsdp_offload_params)",
    "FSDP_ACTIVATION_CHECKPOINTING": "activation checkpointing (--fsdp_activation_checkpointing)",
}
"""What ``accelerate launch`` may ask every process for, by environment variable."""


_SEED_STRIDE = 100_003
"""Between the seeds of two runs, so that run 1 does not repeat run 0's orders one epoch later."""

_SEEDS = 2**32
"""numpy takes no seed beyond these."""


def make_accelerator(mixed_precision: str) -> Accelerator:
    """An accelerator of this precision, whatever an earlier fit of this process had: accelerate keeps one per process.

    Raises:
        ArgumentError: ``accelerate launch`` was asked to divide the model among processes by other means than FSDP2, the
            device does not have this precision, or accelerate does not know of the processes that were started.
    """
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.state import AcceleratorState

    _check_launched()
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision:
        AcceleratorState._reset_state()
    processes = _launched_processes()
    accelerator = Accelerator(
        cpu=processes > 1 and not torch.accelerator.is_available(),  # not by itself: each process would train alone
        mixed_precision=mixed_precision,
        dataloader_config=DataLoaderConfiguration(even_batches=True),
    )
    if accelerator.num_processes == 1 < processes:
        raise ArgumentError(
            f"{processes} processes were started, and accelerate was set up for one before fit, or does not know this device "
            f"({accelerator.device.type}): each would train alone on all samples. Set ACCELERATE_USE_CPU=true to train on CPUs"
        )
    if mixed_precision != "no" and not accelerator.native_amp:  # accelerate itself goes on without a word
        raise ArgumentError(
            f"mixed_precision={mixed_precision!r} has no effect on this device ({accelerator.device.type}); use 'bf16' or 'no'"
        )
    return accelerator


def _launched_processes() -> int:
    """How many ``torchrun`` or ``accelerate launch`` started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE") or 1) if "LOCAL_RANK" in os.environ else 1


def asked_for_fsdp() -> bool:
    """Whether ``accelerate launch`` was asked to divide models among processes."""
    from accelerate.utils import parse_flag_from_env

    return bool(parse_flag_from_env(_FSDP))


def _check_launched() -> None:
    from accelerate.utils import parse_flag_from_env

    asked = [name for variable, name in _REFUSED.items() if parse_flag_from_env(variable)]
    if asked_for_fsdp() and (version := os.environ.get(_FSDP_VERSION, "1")) != "2":
        asked.insert(0, f"FSDP of version {version}")
    if asked:
        raise ArgumentError(
            f"accelerate launch was asked for {asked[0]}, which Trainer does not do; start it with --multi_gpu, as torchrun "
            "does (DDP: the whole model in each process), or with --use_fsdp --fsdp_version 2, which divides the model"
        )


def done_by_main(accelerator: Accelerator, work: Callable[[Callable[[], object]], T]) -> T:
    """What ``work`` gives in the main process, where alone it runs, in all of them; an error of it is raised in all.

    It is given a function to call at least every few minutes: processes that wait longer for another give up.
    """
    from accelerate.utils import broadcast_object_list

    def told(finished: bool, value: Any = None) -> Any:
        return broadcast_object_list([(finished, value)])[0]

    if accelerator.num_processes == 1:
        return work(lambda: None)
    if accelerator.is_main_process:
        try:
            value = work(lambda: told(False))
        except Exception as error:
            told(True, error if isinstance(error, ExitkitError) else RuntimeError(f"{type(error).__name__}: {error}"))
            raise
        told(True, value)
        return value
    finished, found = False, None
    while not finished:
        finished, found = told(False)
    if isinstance(found, ExitkitError | RuntimeError):
        raise found
    return cast("T", found)


def own_part(accelerator: Accelerator, loader: Iterable[Any], name: str) -> Iterable[Any]:
    """The batches of this process: every n-th of the loader's, so that a step takes n of them.

    Raises:
        ArgumentError: the loader yields no batches, or can be read only once; there are several processes, and it is not a
            DataLoader.
    """
    _check_readable(loader, name)
    if accelerator.num_processes == 1:
        return loader
    if not isinstance(loader, DataLoader):
        raise ArgumentError(
            f"{name} is a {type(loader).__name__}; {accelerator.num_processes} processes need a torch DataLoader, whose "
            "batches can be divided among them"
        )
    prepared: Iterable[Any] = accelerator.prepare_data_loader(loader, device_placement=False)
    return prepared


def _check_readable(loader: Any, name: str) -> None:
    check_iterable(loader, name)
    if isinstance(loader, Iterator):
        raise ArgumentError(
            f"{name} is {type(loader).__name__}, which is used up after one pass, and a run makes several; give a torch "
            "DataLoader, or a list of batches"
        )
    if length(loader) == 0:
        raise ArgumentError(f"{name} is empty: it yields no batch; check the data set and drop_last")


def seed_everything(loader: Iterable[Any], seed: int, epoch: int = 0) -> None:
    """A seed per epoch instead of stored generator states: initial order, shuffling and augmentation follow from it."""
    from accelerate.utils import set_seed

    seed = (int(seed) * _SEED_STRIDE + epoch) % _SEEDS
    set_seed(seed)
    outer = getattr(loader, "batch_sampler", None)
    inner = getattr(outer, "batch_sampler", None)  # of a loader divided by accelerate
    samplers = (getattr(owner, "sampler", None) for owner in (loader, outer, inner))
    for owner in (loader, outer, *samplers):
        if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
            generator.manual_seed(seed)


def in_order(loader: DataLoader[Any], dataset: Dataset[Any], batch_size: int, workers: int) -> DataLoader[Any]:
    """A loader of a data set's samples in the order of their numbers, read and collated as ``loader`` does."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def length(loader: Any) -> int | None:
    """Batches per epoch (or samples of a data set); None for a loader that cannot know (an iterable data set)."""
    try:
        return len(cast("Sized", loader))
    except TypeError:
        return None


def random_state() -> dict[str, Any]:
    """Where the random number generators of torch, numpy and Python stand, in values that load without unpickling."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
