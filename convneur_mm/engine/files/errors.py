"""Errors that end a command with one line instead of a traceback."""
from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ...stack import StackError


class LaunchError(ValueError):
    """User input cannot work; the message is one line that names the input, the reason and the remedy."""


def printable(text: str) -> str:
    """Return text without line breaks and the control characters that a terminal would obey."""
    return ''.join(character if character.isprintable() else '?' for character in ' '.join(text.split()))


def some(names: Sequence[object], count: int = 6) -> str:
    """Return the first ``count`` names for a message, and the number of all if there are more; 'nothing' for none."""
    shown = printable(', '.join(map(str, names[:count])))
    return f'{shown}, … {len(names)} in all' if len(names) > count else shown or 'nothing'


def shows_tracebacks() -> bool:
    """Return whether the environment variable CONVNEUR_DEBUG asks for tracebacks of all errors."""
    return os.environ.get('CONVNEUR_DEBUG', '0') not in ('', '0')


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line and exit code 2 on a ValueError, an OSError or a StackError.

    A user can usually fix the cause of these, but it may be a fault of ours: with CONVNEUR_DEBUG=1 in the environment
    the error passes, so that its traceback is shown.
    """
    try:
        yield
    except (ValueError, OSError, StackError) as error:
        if shows_tracebacks():
            raise
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr, flush=True)
        sys.exit(2)
