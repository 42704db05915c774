"""Files that are written whole or not at all, full disks, and readers of a pipe that stop reading."""

import contextlib
import os
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError

from runtime.errors import UsageError, one_line


@contextlib.contextmanager
def replacing(path):
    """Yield a path beside `path` to write to. That file replaces `path` in one go; after an error it is removed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def printing():
    """Around code that only prints. A program that reads our output, such as head, may stop early; that is not an error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def writing(path, scrap=None):
    """Around code that writes a file or a folder: a full or read-only disk becomes a UsageError in one line.

    scrap: a half-written folder, removed whatever goes wrong.
    """
    try:
        yield
    except BaseException as error:
        if scrap:
            shutil.rmtree(scrap, ignore_errors=True)
        if "inline_container" in str(error):  # torch.save on a full disk
            reason = "the disk took only a part"
        elif isinstance(error, (OSError, SafetensorError)):
            reason = getattr(error, "strerror", None) or one_line(error)
        else:
            raise
        raise UsageError(f"{path}: cannot be written ({reason}): make room, or make it writable; then the same command goes "
                         "on from the last checkpoint")


def replace_text(path, text):
    """Write a text file in one go: it is the old one or the new one, whatever happens."""
    with writing(path), replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
