"""Opens the folder of a Hugging Face checkpoint: its configuration and the headers of tensors."""

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
"""File suffixes of pickles."""

_PICKLES_INDEX = tuple(f"{end}.index.json" for end in PICKLED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An open checkpoint, of which only the files' headers have been read.

    Attributes:
      folder: Folder of the checkpoint.
      tensors: Tensors of all files, by name.
    """

    folder: Path
    tensors: dict[str, StoredTensor]


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the `config.json` of a checkpoint.

    Raises:
      ValueError: The file is missing or not a JSON object.
    """
    file = folder / CONFIG
    if not file.is_file():
        if any((folder / name).is_file() for name in (ADAPTER_CONFIG, PEFT_CONFIG)):
            raise ValueError(
                f"{folder} holds an adapter, not a model; give the path of the adapter's base model"
            )
        raise ValueError(f"{folder} has no {CONFIG}: it is not a Hugging Face checkpoint")
    return read_json_object(file)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens a checkpoint of one safetensors file, or of several with an index.

    Nothing is ever unpickled.

    Raises:
      ValueError: There are no safetensors, or the index and the files disagree.
    """
    if (folder / INDEX).is_file():
        return Checkpoint(folder=folder, tensors=_read_sharded(folder))
    if (folder / WEIGHTS).is_file():
        return Checkpoint(folder=folder, tensors=read_header(folder / WEIGHTS))
    raise ValueError(_no_safetensors_message(folder))


def _read_sharded(folder: Path) -> dict[str, StoredTensor]:
    weight_map = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} has no weight_map")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str):
            raise ValueError(
                f"{folder / INDEX} maps {name} to {file_name!r}, which is not a file name"
            )
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
            raise ValueError(
                f"{folder / INDEX} names {file_name!r}, which is not a safetensors file in the"
                " same folder"
            )
        if not (folder / file_name).is_file():
            raise ValueError(f"{folder} lacks {file_name}, which {INDEX} names")
        for name, tensor in read_header(folder / file_name).items():
            if name in tensors:
                raise ValueError(
                    f"{name} is in both {tensors[name].file.name} and {file_name} of {folder}"
                )
            tensors[name] = tensor
    for name, file_name in weight_map.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise ValueError(f"{folder / INDEX} maps {name} to {file_name}, which lacks it")
    return tensors


def _no_safetensors_message(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    pickled = [name for name in names if name.endswith(PICKLED)]
    # Pickles are never fetched from the hub, but their index is.
    pickled += [name for name in names if name.endswith(_PICKLES_INDEX)]
    if pickled:
        return (
            f"{folder} has its weights in {pickled[0].removesuffix('.index.json')} only, a pickle,"
            " which is never loaded because it can run any code."
            f" {_conversion_command(folder)}"
        )
    others = [name for name in names if name.endswith(".safetensors")]
    found = f" (it has {', '.join(others)})" if others else ""
    lacks = f"{folder} has neither {WEIGHTS} nor {INDEX}{found}"
    if others or _hub_name(folder) is None:
        return lacks
    return (
        f"{lacks}; if the weights on the hub are pickles (.bin, .pt), they are never fetched or"
        f" loaded because they can run any code. {_conversion_command(folder)}"
    )


def _conversion_command(folder: Path) -> str:
    """Returns advice with a command that converts a pickle and copies the tokenizer."""
    name = _hub_name(folder)
    source, target = (folder, f"{folder}-safetensors") if name is None else (name, Path(name).name)
    return (
        "If you trust it, convert it with this command, which needs torch:\n"
        f"  python -c \"import transformers as t; source, target = '{source}', '{target}';"
        " t.AutoModelForCausalLM.from_pretrained(source).save_pretrained(target);"
        ' t.AutoTokenizer.from_pretrained(source).save_pretrained(target)"'
    )


def _hub_name(folder: Path) -> str | None:
    """Returns the hub name of a folder in huggingface_hub's cache; None for other folders.

    Example:
      >>> _hub_name(Path("hub/models--org--model/snapshots/1a2b"))
      'org/model'
    """
    repository, snapshots = folder.parent.parent.name, folder.parent.name
    if snapshots != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/")
