"""``python -m exitkit``."""

from exitkit.cli import main

main()
