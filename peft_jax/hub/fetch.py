"""Finds a checkpoint's folder, or fetches it from the Hugging Face hub or a bucket."""

import hashlib
import re
from pathlib import Path

from peft_jax.hub.adapter_files import CONFIG, PEFT_CONFIG
from peft_jax.hub.converted import fetch_small_files, is_location
from peft_jax.runtime.buckets import Bucket, check_names, is_bucket, reach_store
from peft_jax.runtime.errors import StorageError
from peft_jax.runtime.files import atomic_folder, cache_folder

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

FETCHED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
"""Patterns of fetched files: safetensors, JSON and tokenizers, never pickles or code."""


def find_folder(path: str | Path, *, revision: str | None = None) -> Path:
    """Returns the folder of a checkpoint or an adapter, fetching it if necessary.

    Args:
      path: A folder; a name on the Hugging Face hub ("org/model"), fetched once into
        huggingface_hub's cache; the location of a converted checkpoint ("gs://bucket/model"), of
        which all but the arrays is fetched into ~/.cache/peft_jax (or $PEFT_JAX_CACHE); or that of
        an adapter in a bucket ("gs://bucket/runs/first/adapter"), fetched to the same place.
      revision: Branch, tag or commit on the hub.

    Raises:
      ValueError: There is no such folder, and it cannot be fetched.
    """
    if is_location(str(path)):
        if is_bucket(str(path)) and (adapter := _fetch_adapter(str(path))):
            return adapter
        return fetch_small_files(str(path), cache_folder() / "checkpoints")
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    name = str(path)
    if folder.exists():
        raise ValueError(f"{name} is a file; give the folder that holds config.json")
    if not _HUB_NAME.fullmatch(name):
        raise ValueError(f"there is no folder {name}")
    return _fetch(name, revision)


def hub_name(folder: str | Path) -> tuple[str, str] | None:
    """Returns the name and the commit of a folder in huggingface_hub's cache; None for others.

    Example:
      >>> hub_name("/home/me/.cache/huggingface/hub/models--org--model/snapshots/0a1b2c")
      ('org/model', '0a1b2c')
      >>> hub_name("/data/model") is None
      True
    """
    found = re.search(r"/models--([^/]+)/snapshots/([0-9a-f]+)/?$", str(folder))
    return None if found is None else (found[1].replace("--", "/"), found[2])


def _fetch_adapter(location: str) -> Path | None:
    """Fetches an adapter from a bucket; returns None if there is none at the location.

    Raises:
      ValueError: The bucket cannot be reached.
    """
    reach_store(location, CONFIG)
    bucket = Bucket(location)
    try:
        if all(bucket.read(name) is None for name in (CONFIG, PEFT_CONFIG)):
            if bucket.read(f"adapter/{CONFIG}") is not None:
                raise ValueError(
                    f"{location} is the work directory of a run; its adapter is"
                    f" {bucket.url}/adapter"
                )
            return None
        names = [name for name in bucket.names("") if "/" not in name]
        check_names(names, location)
        name = hashlib.sha256(location.encode()).hexdigest()[:16]
        with atomic_folder(cache_folder() / "adapters" / name) as temporary:
            bucket.download({name: temporary / name for name in names})
    except StorageError as error:
        raise ValueError(str(error)) from error
    return cache_folder() / "adapters" / name


def _fetch(name: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(FETCHED))
        )
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no folder {name}, and the Hugging Face hub has no repository of that name"
            " (or it is private: log in with `hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{name} on the Hugging Face hub has no revision {revision!r}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"there is no folder {name}, and the Hugging Face hub cannot be reached (or"
            f" HF_HUB_OFFLINE is set) and the repository is not in its cache: {error}"
        ) from error
