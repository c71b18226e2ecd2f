"""Files and folders that appear whole or not at all, however the run ends, and what killed runs left of them.

Each is made beside its place under a name of its own, `.<name>.<8 hex>.partial`, and locked while its run lives. The
system gives the lock back however the run ends, so what nobody holds is swept, whichever container ran it. Nothing is
flushed to the disk: what a power cut leaves is found out by the hashes in a manifest.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from ztp_deploy.errors import write_failed

_REFUSED_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_PROBE = 1 << 20
_SET_ASIDE = ".old"  # behind the random part, where no name that a user gives can end
_OURS = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}(?P<mark>\.old)?\.partial")
"""Nothing else is swept: the folder may be one in which others keep partial files, too."""


@contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """A scratch folder beside `final` that takes its place when the block ends well, else disappears.

    A finished folder of that name stays usable until it is replaced. Raises WriteFailed where the system refuses
    to write; other errors of the block pass.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        sweep(final.parent)
        scratch, lock = _claim(final, folder=True)
    except OSError as error:
        raise write_failed(str(final), error) from error
    try:
        yield scratch
        _replace(scratch, final)
    except OSError as error:
        if error.errno in _REFUSED_WRITES or _is_within(error, scratch, final):
            raise write_failed(str(final), error) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


def check_writable(folder: Path | None) -> None:
    """Raises WriteFailed where the folder, if one is given, could not be written into: before there is work to lose."""
    if folder is None:
        return
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise write_failed(str(folder), NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise write_failed(str(folder), PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all. Raises WriteFailed."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """As `write_text`, for what is not text."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_once(path.parent.absolute())
        scratch, lock = _claim(path, folder=False)
        try:
            scratch.write_bytes(data)
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
            os.close(lock)
    except OSError as error:
        raise write_failed(str(path), error) from error


def ask_for_room(directory: Path) -> None:
    """Raises the system's OSError where it refuses to write there: a library that failed may not say why."""
    probe = directory / f".{secrets.token_hex(4)}.probe"
    try:
        probe.write_bytes(bytes(_PROBE))
    finally:
        probe.unlink(missing_ok=True)


def sweep(parent: Path) -> None:
    """Removes what killed runs left in `parent`; runs that still live keep theirs.

    A folder that a run was killed while replacing is put back.
    """
    if not parent.is_dir():
        return
    for left in parent.glob(".*.partial"):
        if not (ours := _OURS.fullmatch(left.name)):
            continue
        stood = parent / ours["name"] if ours["mark"] else None
        with suppress(OSError):
            # A folder is set aside only while its parent is locked (`_replace`).
            lock = os.open(parent if stood else left, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(left, stood)
            finally:
                os.close(lock)


@cache
def _sweep_once(parent: Path) -> None:
    """A sweep looks at every file of the folder: too much for each of the many that may be written there."""
    sweep(parent)


def _remove(left: Path, stood: Path | None) -> None:
    """Removes what is left, or puts it back where it `stood` if nothing has taken that place."""
    if not left.is_dir():
        left.unlink(missing_ok=True)
    elif stood and not stood.exists():
        left.rename(stood)
    else:
        shutil.rmtree(left, ignore_errors=True)


def _claim(final: Path, *, folder: bool) -> tuple[Path, int]:
    """A new scratch of our own, and the descriptor that holds its lock until it is closed."""
    while True:
        scratch = _beside(final)
        if folder:
            scratch.mkdir()
        else:
            scratch.touch(exist_ok=False)
        # Between making and locking it another run may have swept it.
        with suppress(FileNotFoundError):
            lock = os.open(scratch, os.O_RDONLY)
            if _locks(lock) and scratch.exists():
                return scratch, lock
            os.close(lock)


def _locks(descriptor: int) -> bool:
    """Whether nobody else holds it. File systems without such locks hold nothing, and nothing is swept there."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _replace(scratch: Path, final: Path) -> None:
    """Gives the scratch folder its name; runs that make the same folder take turns."""
    turn = os.open(final.parent, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(turn, fcntl.LOCK_EX)
        if final.exists():
            _swap(scratch, final)
        else:
            scratch.rename(final)
    finally:
        os.close(turn)


def _swap(scratch: Path, final: Path) -> None:
    old = _beside(final, _SET_ASIDE)
    try:
        final.rename(old)
        scratch.rename(final)
    except BaseException:
        if old.exists() and not final.exists():
            with suppress(OSError):  # where that fails, too, the next sweep does it
                old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(final: Path, mark: str = "") -> Path:
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}{mark}.partial")


def _is_within(error: OSError, *places: Path) -> bool:
    if not isinstance(error.filename, (str, Path)):
        return False
    path = Path(error.filename).absolute()
    return any(path.is_relative_to(place.absolute()) for place in places)
