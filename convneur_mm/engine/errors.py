"""What ends a run with one line instead of a traceback."""


class LaunchError(ValueError):
    """Something the user gave cannot work; the message is one line that names it, the reason and the remedy."""
