"""Writes the model card of an exported model or adapter: `README.md` with the hub's header."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from peft_jax.adapters import AdapterSpec
from peft_jax.hub.fetch import hub_name
from peft_jax.runtime.files import write_text
from peft_jax.version import __version__

CARD = "README.md"

_DATA = ("recipe", "path", "subset", "revision", "train_split", "eval_path", "eval_split")
_TRAINING = ("steps", "epochs", "batch_size", "max_length", "learning_rate")
_MEASURED = ("loss_before", "loss_after", "trainable_parameters", "total_parameters")

_LOADING = {
    "model": (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    ),
    "adapter": (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
        'model = PeftModel.from_pretrained(base, "FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Content of a model card.

    Attributes:
      kind: Whether the folder holds a whole model or an adapter.
      base: Path of the base model, or its name on the hub.
      base_folder: Folder of the base model, whose own card may name a license.
      spec: Specification of the trained adapter.
      run: Settings of the run in the form of its `config.json`; empty if unknown.
      summary: Results of the run in the form of its `summary.json`; empty if unknown.
      notes: Paragraphs on how this export differs from the trained adapter.
    """

    kind: Literal["model", "adapter"]
    base: str
    base_folder: Path
    spec: AdapterSpec
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Returns the card as Markdown."""
        method = self.spec.method
        what = "model" if self.kind == "model" else "adapter"
        parts = [
            self._header(),
            f"# {_last_part(self.base)}, fine-tuned with {method.name}\n",
            f"A {what} fine-tuned from `{self.base}` with the method `{method.name}` of peft_jax"
            f" {__version__}.\n",
            *(f"{note}\n" for note in self.notes),
            "## Loading\n",
            f"```python\n{_LOADING[self.kind].format(base=self.base)}\n```\n",
            "## Method\n",
            _table({"name": method.name, **dataclasses.asdict(method), **self._modules()}),
        ]
        for title, section, names in (
            ("Data", self.run.get("data"), _DATA),
            ("Training", self.run.get("train"), _TRAINING),
            ("Held-out loss, in nats per token, and size", self.summary, _MEASURED),
        ):
            if rows := _present(section or {}, names):
                parts += [f"## {title}\n", _table(rows)]
        parts += ["## License\n", self._license_note()]
        return "\n".join(parts)

    def _header(self) -> str:
        """Returns the YAML header that the hub reads."""
        lines = [
            f"library_name: {'transformers' if self.kind == 'model' else 'peft'}",
            "pipeline_tag: text-generation",
        ]
        if found := hub_name(self.base_folder):
            lines.append(f"base_model: {found[0]}")
        if license_ := license_of(self.base_folder):
            lines.append(f"license: {license_}")
        lines += ["tags:", "- peft_jax", f"- {self.spec.method.name}"]
        return "\n".join(["---", *lines, "---", ""])

    def _modules(self) -> dict[str, Any]:
        """Returns the settings that select modules, without empty ones."""
        return _present(
            vars(self.spec),
            (
                "target_modules",
                "exclude_modules",
                "rank_pattern",
                "alpha_pattern",
                "modules_to_save",
            ),
        )

    def _license_note(self) -> str:
        named = license_of(self.base_folder)
        says = f"its card says `{named}`" if named else "see its own page"
        return (
            f"The license of the base model `{self.base}` applies to what was made from it:"
            f" {says}. The training data may have terms of their own.\n"
        )


def write_card(folder: Path, card: ModelCard) -> None:
    """Writes `README.md` to a folder."""
    write_text(folder / CARD, card.text())


def license_of(folder: Path) -> str | None:
    """Returns the license that the header of a folder's model card names; None without one."""
    file = folder / CARD
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    header = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
    found = header and re.search(r"^license:[ \t]*['\"]?([\w.+-]+)", header[1], re.MULTILINE)
    return found[1] if found else None


def _present(section: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Returns the named values that are given."""
    empty: tuple[Any, ...] = (None, "", (), [], {})
    return {name: section[name] for name in names if section.get(name) not in empty}


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines, ""])


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    elif isinstance(value, Mapping):
        value = ", ".join(f"{key}: {one}" for key, one in value.items())
    elif isinstance(value, float):
        value = f"{value:.6g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _last_part(base: str) -> str:
    return base.rstrip("/").rsplit("/", 1)[-1]
