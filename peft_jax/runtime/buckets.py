"""Reads and writes the objects of a bucket, gs:// or s3://, through TensorStore.

Credentials are those of the machine: for gs:// the application default credentials
(GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, or the machine's service
account), for s3:// those of the AWS command line. AWS_ENDPOINT_URL names a store other than
Amazon's that speaks S3's protocol.
"""

import collections
import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorstore as ts

from peft_jax.runtime.errors import StorageError
from peft_jax.runtime.files import atomic_file

SCHEMES = ("gs", "s3")
"""URL schemes of buckets."""

CONTACT_SECONDS = 12.0
"""Timeout of a store's first response, in seconds; TensorStore would retry for an hour."""

_IN_FLIGHT = 8
"""Largest number of concurrent reads or writes; each holds a whole object in memory."""

_BYTES_IN_FLIGHT = 2**30
"""Size from which on writes are not concurrent."""

_RETRIES = {"max_retries": 12, "initial_delay": "1s", "max_delay": "32s"}
"""Retries of a request, which last about five minutes."""

_AWS_SOURCES = {
    "AWS_PROFILE",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
}
"""Variables that name credentials for S3, besides those that hold them."""

Generation = bytes
"""Version of an object. Writes can be made conditional on it."""


def is_bucket(location: str) -> bool:
    """Returns whether a location is in a bucket.

    Example:
      >>> is_bucket("gs://bucket/runs/first"), is_bucket("/mnt/bucket/runs/first")
      (True, False)
    """
    return location.partition("://")[0] in SCHEMES and "://" in location


def copy_command(url: str) -> str:
    """Returns the command line that copies a folder of a bucket to the disk.

    Example:
      >>> copy_command("gs://bucket/runs/first/model")
      'gcloud storage cp -r gs://bucket/runs/first/model .'
    """
    if url.startswith("s3://"):
        return f"aws s3 cp --recursive {url} {url.rpartition('/')[2]}"
    return f"gcloud storage cp -r {url} ."


def store_spec(location: str) -> Any:
    """Returns TensorStore's specification of the objects under a location.

    Args:
      location: URL of a folder: "gs://…", "s3://…" or "file://…". In a bucket, names of folders are
        taken as they are, and not decoded.

    Example:
      >>> store_spec("gs://bucket/model")
      {'driver': 'gcs', 'bucket': 'bucket', 'path': 'model/'}
    """
    scheme, _, rest = location.partition("://")
    if scheme not in SCHEMES:
        return location.rstrip("/") + "/"
    bucket, _, path = rest.rstrip("/").partition("/")
    spec: dict[str, Any] = {"driver": "gcs", "bucket": bucket, "path": f"{path}/" if path else ""}
    return spec if scheme == "gs" else {**spec, "driver": "s3", **_s3_settings()}


def _s3_settings() -> dict[str, Any]:
    """Returns the settings for S3 that the environment has, and TensorStore does not read."""
    settings: dict[str, Any] = {}
    # Named, because TensorStore otherwise logs every place that has no credentials.
    if "AWS_ACCESS_KEY_ID" in os.environ:
        settings["aws_credentials"] = {"type": "environment"}
    elif not _AWS_SOURCES & os.environ.keys() and not Path("~/.aws").expanduser().is_dir():
        settings["aws_credentials"] = {"type": "imds"}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        settings["endpoint"] = endpoint
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        settings["aws_region"] = region or "us-east-1"
    return settings


def reach_store(location: str, probe: str, *, shown: str = "") -> ts.KvStore:
    """Opens a store and waits for its first response.

    Args:
      location: URL of a folder.
      probe: Name of the object that is read, which need not exist.
      shown: The location in messages, if it was given in another form.

    Raises:
      ValueError: The store does not respond, or denies access.
    """
    shown = shown or location
    try:
        store = ts.KvStore.open(store_spec(location)).result()
        store.read(probe).result(timeout=CONTACT_SECONDS)
    except TimeoutError as error:
        raise ValueError(
            f"{shown} cannot be reached: no response within {CONTACT_SECONDS:.0f} seconds;"
            " check that the bucket exists, the credentials and the network"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{shown} cannot be reached: {_reason(error)}; give gs://bucket/folder or"
            " s3://bucket/folder of a bucket that this machine has access to, or a folder"
        ) from error
    return store


class Bucket:
    """Folder in a bucket.

    Args:
      url: URL of the folder, "gs://bucket/folder" or "s3://bucket/folder".

    Attributes:
      url: URL without a slash at the end.

    Raises:
      ValueError: The URL is invalid.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        retries = {"gcs_request_retries": _RETRIES, "s3_request_retries": _RETRIES}
        try:
            opening = ts.KvStore.open(store_spec(self.url), context=ts.Context(retries))
            self._store = opening.result()
        except ValueError as error:
            raise ValueError(
                f"{url} is not the URL of a folder in a bucket: {_reason(error)}; give"
                " gs://bucket/folder or s3://bucket/folder"
            ) from error

    def locate(self, name: str) -> str:
        """Returns the URL of an object."""
        return f"{self.url}/{name}"

    def names(self, folder: str) -> list[str]:
        """Returns the names of the objects in a subfolder, in order.

        Args:
          folder: Name of the subfolder, with a slash at the end; empty for all.
        """
        # The successor of "adapter/" in the order of names is "adapter0".
        within = ts.KvStore.KeyRange(folder, f"{folder[:-1]}0" if folder else "")
        with _explaining(self.locate(folder), "listed"):
            found = self._store.list(within).result()
        # Consoles make empty objects with a slash at the end, so that folders can be seen.
        return sorted(name for key in found if not (name := key.decode()).endswith("/"))

    def read(self, name: str) -> bytes | None:
        """Returns the content of an object; None if there is none."""
        return self.read_version(name)[0]

    def read_version(
        self, name: str, *, timeout: float | None = None
    ) -> tuple[bytes | None, Generation]:
        """Returns the content of an object, or None, and its generation."""
        with _explaining(self.locate(name), "read"):
            found = self._store.read(name).result(timeout=timeout)
        content = None if found.state == "missing" else found.value
        return content, found.stamp.generation

    def write(self, name: str, content: bytes) -> None:
        """Writes an object."""
        with _explaining(self.locate(name), "written"):
            self._store.write(name, content).result()

    def write_if(
        self,
        name: str,
        content: bytes | None,
        generation: Generation,
        *,
        timeout: float | None = None,
    ) -> Generation | None:
        """Writes an object if it still has a generation.

        Args:
          name: Name of the object.
          content: New content; None deletes the object.
          generation: Generation from `read_version` or `write_if`.
          timeout: Seconds to wait for the response.

        Returns:
          The new generation; None if the object has changed.
        """
        with _explaining(self.locate(name), "written"):
            writing = self._store.write(name, content, if_equal=generation)
            return writing.result(timeout=timeout).generation or None

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects; those that do not exist are ignored."""
        with _explaining(self.url, "written"):
            _each(names, lambda name: self._store.write(name, None), lambda name, result: None)

    def upload(self, files: Mapping[str, Path], *, timeout: float | None = None) -> None:
        """Writes objects with the contents of files.

        Args:
          files: File of each object, by name.
          timeout: Seconds to wait for each response.

        Raises:
          StorageError: An object cannot be written.
        """
        with _explaining(self.url, "written"):
            _each(
                files,
                lambda name: self._store.write(name, files[name].read_bytes()),
                lambda name, result: None,
                size=lambda name: files[name].stat().st_size,
                timeout=timeout,
            )

    def download(self, files: Mapping[str, Path]) -> list[str]:
        """Writes files with the contents of objects.

        Args:
          files: File of each object, by name.

        Returns:
          The names of the objects that exist.

        Raises:
          StorageError: An object cannot be read.
        """
        found: list[str] = []

        def store(name: str, result: ts.KvStore.ReadResult) -> None:
            if result.state == "missing":
                return
            with atomic_file(files[name]) as temporary:
                temporary.write_bytes(result.value)
            found.append(name)

        with _explaining(self.url, "read"):
            _each(files, lambda name: self._store.read(name), store)
        return found


def check_names(names: Iterable[str], where: str) -> None:
    """Rejects names of objects that cannot be names of files in one folder.

    Raises:
      ValueError: A name leads out of the folder.
    """
    for name in names:
        if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name:
            raise ValueError(f"{where} has an object with the name {name!r}; remove it")


def _each(
    names: Iterable[str],
    start: Callable[[str], Any],
    finish: Callable[[str, Any], None],
    *,
    size: Callable[[str], int] = lambda name: 0,
    timeout: float | None = None,
) -> None:
    """Makes a request for each name, a few at a time, and handles the responses in order."""
    waiting: collections.deque[tuple[str, Any]] = collections.deque()

    def finish_first() -> None:
        name, request = waiting.popleft()
        finish(name, request.result(timeout=timeout))

    for name in names:
        while waiting and (
            len(waiting) >= _IN_FLIGHT
            or size(name) + sum(size(other) for other, _ in waiting) > _BYTES_IN_FLIGHT
        ):
            finish_first()
        waiting.append((name, start(name)))
    while waiting:
        finish_first()


@contextlib.contextmanager
def _explaining(where: str, done: str) -> Iterator[None]:
    """Converts TensorStore's errors to a `StorageError` of one line."""
    try:
        yield
    except TimeoutError as error:
        raise StorageError(f"{where} could not be {done}: no response") from error
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise StorageError(f"{where} could not be {done}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Returns an error of TensorStore as text, without the places in its source."""
    text = re.sub(r"\s*\[[a-z_]+='.*", "", str(error), flags=re.DOTALL)
    return " ".join(text.split()).rstrip(".")
