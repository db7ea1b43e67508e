"""What ends a command; `run_main` in console.py turns each into words and an exit status."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend. The message says what was found, what was expected and what to do."""

    def __init__(self, message: str, *, speaks: bool | None = None):
        """speaks: whether this process is the one to print it; None where every rank has the same error."""
        super().__init__(message)
        self.speaks = speaks


class TryLaterError(UserError):
    """Something that passes by itself, such as another run that is still using a folder."""


class PeerError(Exception):
    """Another process of the run failed, which this one only notices: the other's error is the one to read."""


class Terminated(BaseException):
    """SIGTERM or SIGHUP in a command that has nothing to save: it leaves, and removes what is half written.

    Its argument is the signal's name.
    """
