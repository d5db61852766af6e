"""Files that are there, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

__all__ = ["check_file", "write_whole"]


def check_file(path: str | os.PathLike[str], such_as: str) -> Path:
    """The path, once a regular file is there: whoever opens a pipe may wait without end."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if path.is_dir():
        raise IsADirectoryError(f"expected a file, such as {such_as}, got a folder: {path}")
    if not path.is_file():
        raise ValueError(f"{path}: expected a regular file, got a pipe or a device")
    return path


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file beside its place, flush it to disk, and rename it.

    Whoever reads the path finds the old content or the new one, and of two who write at once one wins whole (on Windows
    the other may get a PermissionError). A symbolic link stays, and what it points to is replaced. A file that is
    replaced hands on its permissions, but not its owner or its other hard links. What is no file, such as /dev/stdout,
    is written to as it stands. OSError names the path.
    """
    place = Path(os.path.realpath(path))
    beside = place.with_name(f".{os.urandom(8).hex()}.fastbn.tmp")  # which nobody can know before
    made = False
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # the real path of a pipe could not be opened
            Path(path).write_bytes(content)
            return
        mode = stat.S_IMODE(os.stat(place).st_mode) if place.exists() else None
        # Exclusive: what somebody has planted there is not followed.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(beside, flags, 0o666 if mode is None else mode)
        made = True
        with os.fdopen(descriptor, "wb") as file:
            if mode is not None and os.chmod in os.supports_fd:  # what the umask has taken
                os.chmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, place)
    except BaseException as error:
        if made:
            with contextlib.suppress(OSError):
                beside.unlink()
        if isinstance(error, OSError):
            error.filename = os.fspath(path)
            del error.filename2  # a None would be a part of the message
        raise
    with contextlib.suppress(OSError, AttributeError):  # the new name too outlasts a loss of power, where a system can
        folder = os.open(place.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
