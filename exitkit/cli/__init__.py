"""The command line. Needs the extra ``exitkit[cli]``."""

from __future__ import annotations

import re
import sys
import traceback
import warnings
from itertools import takewhile


def main() -> None:
    """Entry point of the ``exitkit`` command: one clear line and exit code 2 for what a user can put right."""
    try:
        import typer  # noqa: F401
    except ImportError:
        sys.exit("exitkit's command line needs Typer: pip install 'exitkit[cli]'")
    from exitkit.cli.app import app
    from exitkit.common.errors import ExitkitError

    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # where in our code is of no use here
    try:
        app()
    except ExitkitError as error:
        if _asks_for_tracebacks(sys.argv[1:]):
            traceback.print_exc()
        print(f"exitkit: {_without_workers_traceback(str(error))}", file=sys.stderr)
        sys.exit(2)


def _without_workers_traceback(message: str) -> str:
    """What an error says; a process of a DataLoader puts its traceback before it."""
    return re.sub(
        r"\ACaught \w+ in DataLoader worker process .*\n[\w.]+Error: ", "", message, flags=re.DOTALL
    ).rstrip()


def _asks_for_tracebacks(arguments: list[str]) -> bool:
    """Whether ``--verbose`` stands before the command's name."""
    return any(
        one == "--verbose" or re.fullmatch("-[qv]*v[qv]*", one)
        for one in takewhile(lambda it: it[:1] == "-", arguments)
    )
