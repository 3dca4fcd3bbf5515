"""The command line. Needs the extra ``exitkit[cli]``."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the ``exitkit`` command: one clear line and exit code 2 for what a user can put right."""
    try:
        import typer  # noqa: F401
    except ImportError:
        sys.exit("exitkit's command line needs Typer: pip install 'exitkit[cli]'")
    from exitkit.cli.app import app
    from exitkit.common.errors import ExitkitError

    try:
        app()
    except ExitkitError as error:
        print(f"exitkit: {error}", file=sys.stderr)
        sys.exit(2)
