"""Marks a folder of a bucket as in use, so that no two runs write to it.

The object `owner.json` names the process that uses the folder. A thread writes it again every few
seconds, always on the condition that nobody else has. So a process that finds such an object waits
for a while: if the object changes, its owner is alive; otherwise the folder is free. A lock file
on the local disk tells at once that an owner of this machine has died.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peft_jax.runtime.buckets import Bucket, Generation
from peft_jax.runtime.errors import RefusedError, StorageError
from peft_jax.runtime.files import locked, write_text

OWNER = "owner.json"

BEAT_SECONDS = 10.0
RESPONSE_SECONDS = 10.0
"""Seconds after which a request to the bucket counts as failed."""
PATIENCE_SECONDS = 40.0
"""Seconds without a change after which an owner counts as dead."""

_ADVICE = "wait until it ends, or give this one a folder of its own with --workdir"


@contextlib.contextmanager
def lock_bucket(
    bucket: Bucket, local: Path, *, say: Callable[[str], None]
) -> Iterator["BucketLock"]:
    """Holds a folder of a bucket during the block.

    Args:
      bucket: The folder.
      local: Folder on this machine's disk that belongs to the bucket's.
      say: Prints a message before waiting.

    Raises:
      RefusedError: Another process holds the folder, or this one may not write to it.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(local / "lock"))
        except RefusedError as error:
            raise RefusedError(
                f"{bucket.url} is in use by another run on this machine; {_ADVICE}"
            ) from error
        try:
            lock = BucketLock(bucket, local / "token", say=say)
        except StorageError as error:
            raise RefusedError(
                f"{error}; give a --workdir in a bucket that this machine may write to"
            ) from error
        stack.callback(lock.release)
        yield lock


class BucketLock:
    """Takes a folder of a bucket, and keeps it until `release`.

    Args:
      bucket: The folder.
      token: File with the token of the last lock that this machine's lock file protected.
      say: Prints a message before waiting.

    Attributes:
      is_lost: Whether another process has taken the folder.

    Raises:
      RefusedError: Another process holds the folder.
      StorageError: The bucket cannot be read or written.
    """

    def __init__(self, bucket: Bucket, token: Path, *, say: Callable[[str], None]):
        self._bucket = bucket
        self._token = uuid.uuid4().hex
        self._beats = 0
        self.is_lost = False
        content, generation = bucket.read_version(OWNER)
        if content is not None and _parse(content).get("token") != _read_token(token):
            generation = self._wait_until_stale(_parse(content), generation, say)
        # Written before the record: if this process dies, the next one here knows the token.
        write_text(token, self._token)
        taken = bucket.write_if(OWNER, self._record(), generation)
        if taken is None:
            raise RefusedError(f"{bucket.url} is in use by another run; {_ADVICE}")
        self._generation = taken
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="bucket lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises StorageError if another process has taken the folder.

        Raises:
          StorageError: It has, because the bucket did not hear from this process for long.
        """
        if self.is_lost:
            raise StorageError(
                f"another run has taken {self._bucket.url}, because the bucket had no sign of this"
                f" one for {PATIENCE_SECONDS:.0f} seconds"
            )

    def release(self) -> None:
        """Leaves the folder to others."""
        self._leaving.set()
        self._thread.join()
        with contextlib.suppress(StorageError):
            content, generation = self._bucket.read_version(OWNER, timeout=RESPONSE_SECONDS)
            # Read first, because TensorStore deletes without conditions from S3.
            if content is not None and _parse(content).get("token") == self._token:
                self._bucket.write_if(OWNER, None, generation, timeout=RESPONSE_SECONDS)

    def _wait_until_stale(
        self, owner: dict[str, Any], generation: Generation, say: Callable[[str], None]
    ) -> Generation:
        """Waits for a sign of the owner's life, and returns the generation to replace.

        Raises:
          RefusedError: The owner is alive.
        """
        url = self._bucket.url
        who = f"process {owner.get('process', '?')} on {owner.get('host', '?')}"
        say(
            f"{url} was last used by {who}, which did not give it back; waiting"
            f" {PATIENCE_SECONDS:.0f} seconds for a sign of it"
        )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, PATIENCE_SECONDS / 10))
            content, now = self._bucket.read_version(OWNER)
            if content is None:
                return now
            if now != generation:
                raise RefusedError(f"{url} is in use by another run, {who}; {_ADVICE}")
        return generation

    def _record(self) -> bytes:
        self._beats += 1
        record = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "token": self._token,
            # Stores derive an object's generation from its content.
            "beat": self._beats,
        }
        return json.dumps(record).encode()

    def _keep(self) -> None:
        while not self._leaving.wait(BEAT_SECONDS):
            try:
                self._beat()
            except StorageError:
                continue  # If this lasts, another process may take the folder.
            if self.is_lost:
                return

    def _beat(self) -> None:
        written = self._bucket.write_if(
            OWNER, self._record(), self._generation, timeout=RESPONSE_SECONDS
        )
        if written is None:
            # A write without a response may have been made.
            content, written = self._bucket.read_version(OWNER, timeout=RESPONSE_SECONDS)
            self.is_lost = content is None or _parse(content).get("token") != self._token
        self._generation = written


def _parse(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _read_token(file: Path) -> str:
    """Returns the token in a file; one that no owner has, without the file."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
