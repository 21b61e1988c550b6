"""Messages, commands and locks of the set-up."""
from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

EVERY = 30  # seconds between two lines of progress


class SetupError(Exception):
    """The set-up cannot go on; the message says why and what to do."""


def say(text: str) -> None:
    print(f'[setup] {text}', flush=True)


def minutes(seconds: float) -> str:
    return f'{int(seconds) // 60}:{int(seconds) % 60:02} min'


def run(command: Sequence[str | Path], log: Path, env: Mapping[str, str],
        progress: Callable[[str, float], str] = lambda text, seconds: '') -> None:
    """Runs a command with its output in a file, and ends all of its processes when this one is interrupted.

    Args:
        command (Sequence[str | Path]): Program and arguments.
        log (Path): Takes the output; written anew.
        env (Mapping[str, str]): The command's environment.
        progress (Callable[[str, float], str]): Makes of the output so far, and of the seconds since the start, what
            is shown every half a minute behind the elapsed time. Defaults to nothing.

    Raises:
        SetupError: If the command fails; with the end of its output.
    """
    started = shown = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('w', encoding='utf-8') as output:
        # In a session of its own, so that the compilers it starts can be ended with it.
        process = subprocess.Popen([str(part) for part in command], stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT, env=dict(env), start_new_session=True)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                now = time.monotonic()
                if now - shown >= EVERY:
                    shown = now
                    detail = progress(log.read_text(encoding='utf-8', errors='replace'), now - started)
                    say(f'    {minutes(now - started)} elapsed{detail and ", " + detail}')
        finally:
            if process.poll() is None:
                end_group(process)
    if process.returncode:
        tail = log.read_text(encoding='utf-8', errors='replace').splitlines()[-25:]
        raise SetupError('\n'.join([*tail, f'the command above failed (exit code {process.returncode}); its whole '
                                    f'output: {log}']))


def end_group(process: subprocess.Popen) -> None:
    """Ends a process and all that it has started in its session."""
    for sign, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, sign)
            process.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def pip_progress(text: str, seconds: float) -> str:
    """The last thing that pip said it does."""
    for line in reversed(text.splitlines()):
        words = line.split()
        if words and words[0] in ('Downloading', 'Building', 'Installing', 'Using', 'Collecting', 'Preparing'):
            return ' '.join(words)[:100]
    return ''


@contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Keeps a second set-up out of the same folder until this one is done."""
    import fcntl
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f'another set-up is at work on {what}; waiting for it')
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems know no locks
            say(f'{path} cannot be locked ({error}): do not run two set-ups at once')
        yield
