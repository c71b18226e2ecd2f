"""What the command line shows: progress on stderr, results on stdout, JSON on demand."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text


def reader_gone() -> int:
    """The exit code of a program whose output is piped into one that has ended, such as `head`; it writes no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


class _Console(Console):
    def on_broken_pipe(self) -> None:  # left to itself rich ends with the code of a failed gate
        raise SystemExit(reader_gone())


# Square brackets and words between colons are part of many a path.
out = _Console(highlight=False, markup=False, emoji=False)
err = _Console(stderr=True, highlight=False, markup=False, emoji=False)


class Bars:
    """Progress on stderr: one line a step, with a bar where the amount of work is known."""

    @contextlib.contextmanager
    def step(self, title: str, total: float | None) -> Iterator[Any]:
        progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            console=err,
            transient=False,
            disable=not err.is_terminal,
        )
        if not err.is_terminal:
            err.print(title)
        with progress:
            task = progress.add_task(title, total=total)
            yield lambda amount: progress.update(task, advance=amount)
            progress.update(task, total=total or 1, completed=total or 1)

    def warn(self, text: str) -> None:
        warn(text)


def warn(text: str) -> None:
    err.print(Panel(Text(text), title="note", title_align="left", border_style="yellow"))


def recorded(what: str) -> None:
    err.print(f"Recorded {what}", soft_wrap=True)


def titled_table(title: str, *columns: Column | str, **look: Any) -> Table:
    """A table under its title, which stands at the left."""
    return Table(*columns, title=title, title_justify="left", title_style="bold", **look)


def print_json(value: Any) -> None:
    """One JSON object on stdout; what is not finite as "NaN" or "Infinity", as evidence files have it."""
    plain = json.loads(json.dumps(value), parse_constant=str)
    try:
        sys.stdout.write(json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError as error:  # typer would make a failed gate of it, and Python, flushing at its end, code 120
        raise SystemExit(reader_gone()) from error
