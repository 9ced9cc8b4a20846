"""Defines the errors that end a command with one message, and their exit codes."""

import enum


class ExitCode(enum.IntEnum):
    """Exit codes of all commands.

    The last three are 128 plus a signal's number, as a shell reports a program that a signal ends.
    """

    DONE = 0
    """The command finished. With --plan, the run fits."""
    FAILED = 1
    """The command began and failed: a full disk, a non-finite loss, a bug in the code."""
    REFUSED = 2
    """The request is invalid; the message says what would work."""
    LOST_CONTACT = 3
    """Another process of the run is gone."""
    DOES_NOT_FIT = 4
    """The planned run does not fit in device memory."""
    INTERRUPTED = 130
    """Stopped by Ctrl-C."""
    NO_READER = 141
    """The reader of the output closed the pipe."""
    TERMINATED = 143
    """Stopped by SIGTERM."""


class EndingError(Exception):
    """Base class of errors whose message is all that the user needs.

    Attributes:
      exit_code: Exit code of the command.
    """

    exit_code: int = ExitCode.FAILED


class RefusedError(EndingError):
    """The request is invalid; the message says why and what would work.

    Raised before any long work: an unknown setting, a missing folder, a work directory of another
    run. `train.py` prints only the message and exits with code 2.
    """

    exit_code = ExitCode.REFUSED


class NonFiniteError(EndingError):
    """The loss or the gradient is not finite; the message names the last good checkpoint."""

    exit_code = ExitCode.FAILED


class BadDataError(EndingError):
    """The run read an unusable row, and its settings make that an error."""

    exit_code = ExitCode.FAILED


class StorageError(EndingError):
    """The work directory is no longer writable: a full disk, a limit, a lost connection."""

    exit_code = ExitCode.FAILED


class InterruptedRunError(EndingError):
    """A signal asked the run to stop, and the run saved its progress.

    Attributes:
      exit_code: 128 plus the signal's number: 143 for SIGTERM, 130 for SIGINT.
    """

    def __init__(self, message: str, *, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number
