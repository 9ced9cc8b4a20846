"""Errors that end a command with a message in place of a traceback, each with its exit code."""

import enum


class ExitCode(enum.IntEnum):
    """The exit codes of all commands.

    The last three are what a shell reports of a program that a signal ends.
    """

    DONE = 0
    """Finished; with --plan, the run fits."""
    FAILED = 1
    """It began and could not end: a full disk, a loss that is not finite, a fault in the code."""
    REFUSED = 2
    """What was asked for cannot be done as it was asked; the message says what would work."""
    LOST_CONTACT = 3
    """Another process of the run is gone."""
    DOES_NOT_FIT = 4
    """Planned, and it does not fit into the devices' memory."""
    INTERRUPTED = 130
    """Stopped by Ctrl-C."""
    NO_READER = 141
    """Whoever read the output went away."""
    TERMINATED = 143
    """Stopped by SIGTERM."""


class EndingError(Exception):
    """What ends a command, with a message that is all its user needs.

    Attributes:
      exit_code: of the command.
    """

    exit_code: int = ExitCode.FAILED


class RefusedError(EndingError):
    """What was asked for cannot be done; the message says why and what would work.

    Raised before any long work: a setting that is not known, a folder that is not there, a work
    directory that holds another run. `train.py` prints the message alone and exits with code 2.
    """

    exit_code = ExitCode.REFUSED


class NonFiniteError(EndingError):
    """The loss or the gradient stopped being finite; the message names the last good checkpoint."""

    exit_code = ExitCode.FAILED


class BadDataError(EndingError):
    """A row that cannot be used was met during the run, and the settings make that an error."""

    exit_code = ExitCode.FAILED


class StorageError(EndingError):
    """The work directory cannot be written any more: a full disk, a limit, a lost connection."""

    exit_code = ExitCode.FAILED


class InterruptedRunError(EndingError):
    """The run was asked to stop by a signal, and saved what it had.

    Attributes:
      exit_code: 128 + the signal's number, as a shell reports it: 143 for SIGTERM, 130 for SIGINT.
    """

    def __init__(self, message: str, *, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number
