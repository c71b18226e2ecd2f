"""Libraries that talk to their own developers, kept off the user's terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*packages: str, errors: bool = False) -> Iterator[None]:
    """Without the packages' log, and without what anybody warns of or prints meanwhile; `errors`: nor to stderr.

    Warnings cannot be told apart by package: torch's exporter lays its own to the file that called it. Exceptions pass.
    """
    known = [name for name in logging.root.manager.loggerDict if any(f"{name}.".startswith(f"{p}.") for p in packages)]
    loggers = [logging.getLogger(name) for name in {*packages, *known}]
    levels = [logger.level for logger in loggers]
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if errors:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
