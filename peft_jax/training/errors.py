"""What ends a run before its last step, each with its exit code for `train.py`."""

from peft_jax.exits import EndingError, ExitCode


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
