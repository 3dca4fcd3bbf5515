"""HTML pages that need nothing else, from templates in the package."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from exitkit.common.versions import installed_versions


def rendered(template: str, filters: dict[str, Callable[..., str]], **values: Any) -> str:
    """The page of a template, by its place in the package (``report/page/report.html``), which includes others likewise."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        loader=jinja2.FunctionLoader(source),
    )
    environment.filters.update(filters)
    css = Markup(source("report/page/report.css"))
    return environment.get_template(template).render(**values, css=css, version=installed_versions()["exitkit"])


def source(place: str) -> str:
    """A text file of the package."""
    return (files("exitkit") / place).read_text(encoding="utf-8")
