"""Kernel timings kept between builds: one file a library, version and device, safe against other processes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ztp_deploy.atomic import write_bytes


def directory() -> Path:
    """`$ZTP_CACHE/tensorrt`, or `ztp_deploy/tensorrt` in the user's cache folder."""
    own = os.environ.get("ZTP_CACHE")
    if own:
        return Path(own) / "tensorrt"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ztp_deploy" / "tensorrt"


def path_for(library: str, version: str, device: str) -> Path:
    """Timings hold for one device and one version only."""
    return directory() / f"{library}-{version}-{device}.timings"


def read(path: Path) -> bytes:
    """What is there; empty where nothing is."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def update(path: Path, combine: Callable[[bytes], bytes]) -> None:
    """Replaces the file by `combine(what it holds now)`, whole or not at all; other processes wait.

    Raises OSError or WriteFailed where the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        write_bytes(path, combine(read(path)))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # closing the file gives it back, however the process ends
        yield
