"""Help in plain text: commands and options in sections by what they are for, and an example below each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from exitkit.common.errors import ArgumentError


class SectionedCommand(TyperCommand):
    """Its options stand under the ``rich_help_panel`` they name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        typed, _, _ = self.make_parser(ctx).parse_args(list(args))
        if typed.get("out") == "":  # as a Path it would be the current folder
            raise ArgumentError("--out is empty; name a file or a folder (. is the current folder)")
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(record)
        write_sections(formatter, sections)


class SectionedGroup(TyperGroup):
    """Its commands stand under the ``rich_help_panel`` they name, each with the whole first sentence of its help."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.commands[name]
            first = " ".join((command.help or "").partition("\n\n")[0].split())
            sections.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append((name, first))
        write_sections(formatter, sections)


def write_sections(formatter: Any, sections: dict[str, list[tuple[str, str]]]) -> None:
    for heading, records in sections.items():
        if records:
            with formatter.section(heading):
                formatter.write_dl(records)


def add(app: typer.Typer, function: Callable[..., None], section: str | None, *examples: str) -> None:
    """A command of the function's name, with examples of what is typed after ``exitkit``."""
    lines = "\n".join(f"  exitkit {line}" for line in examples)
    epilog = f"\b\nExample{'s' * (len(examples) > 1)}:\n{lines}"
    app.command(cls=SectionedCommand, rich_help_panel=section, epilog=epilog)(function)
