"""Libraries that log much while they try something."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """While open, what these libraries log in this thread is dropped; other threads and other libraries are heard."""
    thread = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return threading.get_ident() != thread or record.name.partition(".")[0] not in libraries

    loggers = [logging.root, *list(logging.root.manager.loggerDict.values())]
    handlers = {handler for logger in loggers if isinstance(logger, logging.Logger) for handler in logger.handlers}
    if logging.lastResort is not None:  # takes warnings where no logger has a handler
        handlers.add(logging.lastResort)
    with ExitStack() as filters:
        for handler in handlers:
            handler.addFilter(passes)
            filters.callback(handler.removeFilter, passes)
        yield
