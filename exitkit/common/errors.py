"""The one exception exitkit raises for what a user can put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ExitkitError(ValueError):
    """Bad input: the message names the argument, the value received, what is allowed, and the remedy."""


def unknown_name(argument: str, value: object, allowed: Iterable[str], remedy: str = "") -> ExitkitError:
    """The error for a name that is not among ``allowed``; near matches come first."""
    names = list(allowed)
    near = difflib.get_close_matches(str(value), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
    listed = ", ".join(repr(name) for name in names[:12]) + (", ..." if len(names) > 12 else "")
    tail = f" {remedy}" if remedy else ""
    return ExitkitError(f"{argument}={value!r} is unknown.{hint} Allowed: {listed}.{tail}")
