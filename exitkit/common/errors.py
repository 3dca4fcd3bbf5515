"""What exitkit raises for what a user can put right: one exception to catch, and kinds of it for a program to tell apart."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SHOWN = 12


class ExitkitError(ValueError):
    """The one to catch. The message names the argument, the value received, what is allowed, and the remedy."""


class ArgumentError(ExitkitError):
    """An argument, an input or a loader that cannot be used as it is."""


class FileError(ExitkitError):
    """A file that is missing, damaged, of another program, or of another version."""


class HubError(ExitkitError):
    """The Hugging Face Hub cannot be reached, or refuses."""


class NotCapturableError(ExitkitError):
    """A model that cannot be captured, cut or exported."""


class DivergedError(ExitkitError):
    """Training came to numbers that are not finite.

    Attributes:
        exit: the number of the exit where they appeared, or None where it is not one of the exits.
    """

    def __init__(self, message: str, exit: int | None = None) -> None:
        super().__init__(message)
        self.exit = exit


def unknown_name(
    argument: str, value: object, allowed: Iterable[str], remedy: str = "", shown: int = _SHOWN
) -> ArgumentError:
    """The error for a name that is not among ``allowed``, of which so many are ``shown``; near matches come first."""
    names = list(allowed)
    hint = near_match(str(value), names)
    listed = ", ".join(repr(name) for name in names[:shown]) + (", ..." if len(names) > shown else "")
    tail = f" {remedy}" if remedy else ""
    return ArgumentError(f"{argument}={value!r} is unknown.{hint} Allowed: {listed}.{tail}")


def near_match(value: str, names: Iterable[str]) -> str:
    """``" Did you mean …?"`` where some of the names are much like ``value``, or nothing."""
    near = difflib.get_close_matches(value, list(names), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
