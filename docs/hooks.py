"""Docstrings name objects in Sphinx's way, :func:`exitkit.attach`; here the name alone stays, as code."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|attr|mod):<code>~?([^<]*)</code>")


def on_page_content(html: str, **_: Any) -> str:
    return _ROLE.sub(r"<code>\1</code>", html)
