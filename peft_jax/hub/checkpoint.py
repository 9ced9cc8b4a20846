"""A folder with a Hugging Face checkpoint: its configuration, and where each tensor is."""

import dataclasses
from pathlib import Path
from typing import Any

from peft_jax.hub.adapter_files import CONFIG as ADAPTER_CONFIG
from peft_jax.hub.adapter_files import PEFT_CONFIG
from peft_jax.hub.tensors import StoredTensor, read_header
from peft_jax.runtime.files import read_json_object

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""The ends of the names of files that are pickles."""

_PICKLES_INDEX = tuple(f"{end}.index.json" for end in PICKLED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint's tensors, by name; nothing but the files' headers has been read.

    Attributes:
      folder: where it is.
      tensors: of all of its files.
    """

    folder: Path
    tensors: dict[str, StoredTensor]


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of a checkpoint.

    Raises:
      ValueError: the folder has none, or it is not a JSON object.
    """
    file = folder / CONFIG
    if not file.is_file():
        if any((folder / name).is_file() for name in (ADAPTER_CONFIG, PEFT_CONFIG)):
            raise ValueError(
                f"{folder} holds an adapter, not a model: give the path of the model it was made"
                " for"
            )
        raise ValueError(f"{folder} has no {CONFIG}: it is not a Hugging Face checkpoint")
    return read_json_object(file)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Finds the tensors of a checkpoint, in one file or several with an index.

    Nothing is ever unpickled: a checkpoint without safetensors is refused.

    Raises:
      ValueError: there are no safetensors, or the index and the files disagree.
    """
    if (folder / INDEX).is_file():
        return Checkpoint(folder=folder, tensors=_read_sharded(folder))
    if (folder / WEIGHTS).is_file():
        return Checkpoint(folder=folder, tensors=read_header(folder / WEIGHTS))
    raise ValueError(_without_safetensors(folder))


def _read_sharded(folder: Path) -> dict[str, StoredTensor]:
    weight_map = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} has no weight_map")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str):
            raise ValueError(
                f"{folder / INDEX} gives {name} the file {file_name!r}, which is not the name of"
                " one"
            )
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
            raise ValueError(
                f"{folder / INDEX} points to {file_name!r}, which is not a safetensors file beside"
                " it"
            )
        if not (folder / file_name).is_file():
            raise ValueError(f"{folder} lacks {file_name}, which {INDEX} points to")
        for name, tensor in read_header(folder / file_name).items():
            if name in tensors:
                raise ValueError(
                    f"{name} is in both {tensors[name].file.name} and {file_name} of {folder}"
                )
            tensors[name] = tensor
    for name, file_name in weight_map.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise ValueError(f"{folder / INDEX} says that {name} is in {file_name}; it is not")
    return tensors


def _without_safetensors(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    pickled = [name for name in names if name.endswith(PICKLED)]
    # Of a repository on the hub pickles are never fetched, but the index that names them is.
    pickled += [name for name in names if name.endswith(_PICKLES_INDEX)]
    if pickled:
        return (
            f"{folder} has its weights in {pickled[0].removesuffix('.index.json')} only, a pickle:"
            f" loading one can run any code, so it is never done here. {_how_to_convert(folder)}"
        )
    others = [name for name in names if name.endswith(".safetensors")]
    found = f" (it has {', '.join(others)})" if others else ""
    lacks = f"{folder} has neither {WEIGHTS} nor {INDEX}{found}"
    if others or _hub_name(folder) is None:
        return lacks
    return (
        f"{lacks}: if the weights on the hub are pickles (.bin, .pt), which can run any code, they"
        f" are neither fetched nor loaded. {_how_to_convert(folder)}"
    )


def _how_to_convert(folder: Path) -> str:
    """What makes safetensors of a pickle, and brings the tokenizer along."""
    name = _hub_name(folder)
    source, target = (folder, f"{folder}-safetensors") if name is None else (name, Path(name).name)
    return (
        "Convert it, where you trust it, with (it takes torch):\n"
        f"  python -c \"import transformers as t; source, target = '{source}', '{target}';"
        " t.AutoModelForCausalLM.from_pretrained(source).save_pretrained(target);"
        ' t.AutoTokenizer.from_pretrained(source).save_pretrained(target)"'
    )


def _hub_name(folder: Path) -> str | None:
    """The name on the hub of a folder in huggingface_hub's cache; None of another.

    Example:
      >>> _hub_name(Path("hub/models--org--model/snapshots/1a2b"))
      'org/model'
    """
    repository, snapshots = folder.parent.parent.name, folder.parent.name
    if snapshots != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/")
