"""Checkpoints: everything a killed run needs, replaced whole or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from exitkit.common.errors import ArgumentError, FileError
from exitkit.common.files import replacing

_FORMAT = "exitkit-checkpoint-2"
NAME = "checkpoint.pt"


def save_checkpoint(directory: Path, settings: dict[str, Any], state: dict[str, Any]) -> None:
    """Write ``state`` to the run directory; the previous checkpoint stays until the new one is complete."""
    with a_full_disk_survived(directory), replacing(directory / NAME) as temporary:
        torch.save({"format": _FORMAT, "settings": settings, **state}, temporary)


@contextmanager
def a_full_disk_survived(directory: Path) -> Iterator[None]:
    """A file that cannot be written costs this file, with a warning, and not the run."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError for a full disk
        reason = next(iter(str(error).splitlines()), "no message")
        warnings.warn(
            f"nothing was written to {str(directory)!r} ({type(error).__name__}: {reason}); the run goes on, and what was "
            "written before stays",
            stacklevel=4,
        )


def load_checkpoint(directory: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The run directory's checkpoint, or None when there is none yet. Loaded without unpickling code.

    Raises:
        ExitkitError: a damaged file, a foreign one, or one made with other settings.
    """
    path = directory / NAME
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler meets in a damaged file
        raise FileError(
            f"checkpoint {str(path)!r} is damaged or no checkpoint ({type(error).__name__}); delete it to start again"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise FileError(f"checkpoint {str(path)!r} was not written by exitkit.Trainer; use another output_dir")
    for name, value in settings.items():
        if state["settings"].get(name) != value:
            raise ArgumentError(
                f"checkpoint {str(path)!r} was made with {name}={state['settings'].get(name)!r}, this run has {value!r}; "
                "use the same settings to continue, another output_dir, or resume='never' to start again"
            )
    return state


def remove_leftovers(directory: Path) -> None:
    """Half-written checkpoints of a run that was killed while it wrote one."""
    for leftover in directory.glob(f".{Path(NAME).stem}-*{Path(NAME).suffix}"):
        leftover.unlink(missing_ok=True)
