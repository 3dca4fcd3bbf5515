"""Checkpoints: everything that a killed run needs, replaced whole or not at all, and refused when anything in it changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from exitkit.common.errors import ArgumentError, FileError
from exitkit.common.files import replacing
from exitkit.common.hashes import digest
from exitkit.training.progress import LOG
from exitkit.training.sharding import remove_shards, write_shards

_PREFIX = "exitkit-checkpoint-"
_FORMAT = f"{_PREFIX}5"
NAME = "checkpoint.pt"
DATA = ("train_loader ", "val_loader ")
"""How the names of settings begin that are read off the loaders."""


def save_checkpoint(directory: Path, settings: dict[str, Any], state: dict[str, Any], main: bool = True) -> None:
    """Write ``state`` to the run directory; the previous checkpoint stays until the new one is complete.

    Called in the main process, or in all where the model is divided among them: each then writes its parts to a new folder.
    """
    with disk_errors_as_warnings(directory):
        content = {"format": _FORMAT, "settings": settings, **write_shards(state, directory)}
        if main:
            with replacing(directory / NAME) as temporary:
                torch.save({**content, "sha256": digest(content)}, temporary)
            remove_shards(directory, keep=content.get("shards"))


@contextmanager
def disk_errors_as_warnings(directory: Path) -> Iterator[None]:
    """A file that cannot be written ends in a warning, and the run goes on."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError for a full disk
        reason = next(iter(str(error).splitlines()), "no message")
        warnings.warn(
            f"nothing was written to {str(directory)!r} ({type(error).__name__}: {reason}); the run goes on, and what was "
            "written before stays",
            stacklevel=4,
        )


def load_checkpoint(directory: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The run directory's checkpoint, or None when there is none yet. Loaded without unpickling code.

    ``settings`` must be the same for the run to be continued; None for one of the data's means unknown.

    Raises:
        FileError: a damaged or changed file, one of another program, or of another format.
        ArgumentError: a checkpoint made with other settings or other data.
    """
    path = directory / NAME
    if not path.exists():
        return None
    state = _read(path)
    for name, value in settings.items():
        was = state["settings"].get(name)
        if was != value and not (name.startswith(DATA) and None in (was, value)):
            raise ArgumentError(
                f"checkpoint {str(path)!r} was made with {name}={was!r}, this run has {value!r}; continue with the same, use "
                "another output_dir, or start again by resume='never' (exitkit train: --set trainer.resume=never)"
            )
    return state


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler meets in a damaged file
        raise FileError(
            f"checkpoint {str(path)!r} is damaged or no checkpoint ({type(error).__name__}); delete it to start again"
        ) from error
    found = state.get("format") if isinstance(state, dict) else None
    if not isinstance(found, str) or not found.startswith(_PREFIX):
        raise FileError(f"checkpoint {str(path)!r} was not written by exitkit.Trainer; use another output_dir")
    if found != _FORMAT:
        raise FileError(
            f"checkpoint {str(path)!r} has the format {found!r}, this version of exitkit reads {_FORMAT!r}; finish the run "
            "with the version that began it, or start again by resume='never'"
        )
    expected = state.pop("sha256", None)
    try:
        intact = digest(state) == expected
    except (RuntimeError, TypeError, ValueError) as error:
        raise _changed(path) from error
    if not intact:
        raise _changed(path)
    return state  # type: ignore[no-any-return]


def _changed(path: Path) -> FileError:
    return FileError(
        f"checkpoint {str(path)!r} is damaged: its content is not what was written; delete it to start again"
    )


def remove_checkpoint(directory: Path) -> None:
    """What a run kept to be continued: its checkpoint and its cached features."""
    for path in (directory / NAME, *directory.glob("features-*.safetensors")):
        path.unlink(missing_ok=True)
    remove_shards(directory)


def remove_leftovers(directory: Path) -> None:
    """Half-written checkpoints and logs of a run that was killed while it wrote one."""
    for name in (NAME, LOG):
        for leftover in directory.glob(f".{Path(name).stem}-*{Path(name).suffix}"):
            leftover.unlink(missing_ok=True)
