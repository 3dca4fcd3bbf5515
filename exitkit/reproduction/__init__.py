"""The papers' tables: every row a setting that can be run, with the published numbers beside."""

from exitkit.reproduction.results import Outcome, markdown, record, shown
from exitkit.reproduction.scales import SCALES, Setting, settings_of
from exitkit.reproduction.tables import Paper, Row, Table, find_table, papers

__all__ = [
    "SCALES",
    "Outcome",
    "Paper",
    "Row",
    "Setting",
    "Table",
    "find_table",
    "markdown",
    "papers",
    "record",
    "settings_of",
    "shown",
]
