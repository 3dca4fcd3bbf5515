"""Which tests take how long: those above half a second stand in ``durations.txt``, written from a measured run.

    python -m pytest -n auto --dist loadscope --junitxml=run.xml && python -m tests.durations run.xml

``conftest.py`` marks them by it: ``slow`` from three seconds on, left to ``make slow``, and ``seconds`` below, which
``make check`` leaves out. A new test is in all of them until it is measured.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

LISTED = Path(__file__).parent / "durations.txt"
SECONDS, SLOW = 0.5, 3.0


def mark_of(function: str, durations: dict[str, float]) -> str | None:
    """``"slow"``, ``"seconds"``, or None for a test function as ``tests.test_engine::test_name``."""
    taken = durations.get(function, 0.0)
    return "slow" if taken >= SLOW else "seconds" if taken >= SECONDS else None


def read() -> dict[str, float]:
    """Seconds of the longest case of each listed function."""
    lines = LISTED.read_text(encoding="utf-8").splitlines()
    return {function: float(seconds) for seconds, function in map(str.split, lines)}


def write(junit: str) -> None:
    """List what a run took, fixtures included."""
    longest: dict[str, float] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        function = f"{case.get('classname')}::{case.get('name', '').partition('[')[0]}"
        longest[function] = max(longest.get(function, 0.0), float(case.get("time", 0)))
    lines = [f"{seconds:.1f} {function}\n" for function, seconds in sorted(longest.items()) if seconds >= SECONDS]
    LISTED.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1])
