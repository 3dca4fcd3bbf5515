"""Writing files so that an interrupted or failed write never leaves half of one, nor loses the old one."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from exitkit.common.errors import FileError

T = TypeVar("T")
UNCHANGED = "; what was there is unchanged"
_LONGEST_STEM = 40
_ATTEMPTS = 20


class WriteError(FileError, OSError):
    """A file that cannot be written; also an ``OSError``, for those who catch that."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path``; moved over it when the block succeeds, deleted when it fails.

    What is written is on the disk before it is moved, so that a power cut leaves the old file or the new one. The
    permissions of an existing file stay, and a symbolic link goes on pointing where it does.

    Raises:
        WriteError: a full disk, a folder that cannot be written to, or a name that cannot be.
    """
    try:
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _created_beside(target)
        try:
            mode = (target if target.exists() else temporary).stat().st_mode & 0o7777
            yield temporary
            _flush(temporary)
            temporary.chmod(mode)  # some writers put a file of their own there
            temporary.replace(target)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and not _of_writing(error, target):
            raise
        raise unwritten(path, error) from error


def unwritten(path: str | os.PathLike[str], error: Exception) -> WriteError:
    """What is said of a file whose replacement could not be written."""
    reason = getattr(error, "strerror", None) or str(error)
    return WriteError(f"{str(path)!r} cannot be written: {reason}{UNCHANGED}")


def _of_writing(error: OSError, target: Path) -> bool:
    """Whether an error is of the file that is written, not of one that the block reads meanwhile."""
    if error.filename is None:
        return error.errno is not None
    named = Path(os.fsdecode(error.filename))
    return named.parent == target.parent or named in target.parents


def make_folder(folder: Path, named: str = "folder ") -> None:
    """A folder to write into, made where it does not exist.

    Args:
        folder: its path.
        named: what an error says before the path, such as ``"output_dir="``.

    Raises:
        WriteError: it is a file, cannot be made, or not be written to.
    """
    if folder.is_file():
        raise WriteError(f"{named}{str(folder)!r} is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise WriteError(
            f"{named}{str(folder)!r} cannot be written: {error.strerror}; give one where you may write"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One at a time among those, in any process, who change several files of ``folder`` that belong together.

    The lock is on the folder itself, leaves no file, and ends with the process. Where the system has none (Windows, some
    network drives), there is none.

    Raises:
        WriteError: as :func:`make_folder`, which makes it.
    """
    make_folder(folder)
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def read_together(read: Callable[[], T]) -> T:
    """What ``read`` gives: begun again where a file vanished under it, because a save replaced those that belong together.

    Raises:
        FileError: what ``read`` raises for any other reason, or again and again.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return read()
        except FileError as error:
            if not isinstance(error.__cause__, FileNotFoundError) or attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def _created_beside(target: Path) -> Path:
    """An empty file of a new name, with the permissions that a new file gets: the umask is never touched."""
    name = f".{target.stem[:_LONGEST_STEM]}-{secrets.token_hex(8)}{target.suffix[:_LONGEST_STEM]}"
    temporary = target.with_name(name)
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return temporary


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
