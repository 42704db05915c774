"""What ends a run early, and how the reason becomes one line.

    UsageError    exit code 2: the user has to change something first (a key, a file, a row, a disk); DataError names the row
    Stopped       exit code 75: the run was interrupted, or answers are missing; the same command goes on
    one_line      any text, made fit for a message
"""


class UsageError(Exception):
    """What the user asked for cannot be done; the message says what, where and what to do."""


class DataError(UsageError):
    """A row or a source that cannot be used; the message names the source, row and field, and says what to do."""


class Stopped(Exception):
    """The run stops here on purpose, and the same command resumes it; the message says why."""


def one_line(value, limit=None):
    """A value as one printable line: white space joined, control characters escaped, cut after `limit` characters."""
    text = str(value) if limit is None else str(value)[:4 * limit]
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    return text if limit is None or len(text) <= limit else text[:limit] + "…"
