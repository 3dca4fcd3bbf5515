"""Heads that are copies of the backbone's own layers: its read-out (``tail``), or a shortened rest of it (``branch-n``)."""
