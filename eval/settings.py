"""Defines the settings of an evaluation, which are checked before anything is loaded."""

import dataclasses
from pathlib import Path
from typing import Any

from peft_jax.core import FORMATS
from peft_jax.core.validation import check_choice, check_positive_int
from peft_jax.parallel import MeshSettings
from peft_jax.runtime.buckets import copy_command

from .tasks.build import TaskSettings

_ADAPTER, _MODEL = "adapter", "model"
"""Subfolders of a run that can be evaluated, in order of preference."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Settings of an evaluation.

    Attributes:
      tasks: Names of suites and tasks (`eval.tasks.names`).
      workdir: Folder of a finished run, whose adapter or, if it has none, whole model is evaluated.
      url: URL of a run in a bucket, of which `workdir` has copies of the small files.
      model: Folder of a checkpoint, or its name on the hub; with `workdir` or `adapter`, the base
        model.
      adapter: Folder of an adapter, or its name on the hub.
      merge: Whether the adapter is merged into the parameters or bound to them.
      dtype: Parameter and compute dtype, "float32" or "bfloat16".
      quantization: Quantization of the base model, one of `peft_jax.core.FORMATS`; None: as in
        training, or "none" if unknown.
      output: Folder of the results; None: eval/ in the run's folder, or runs/eval-NAME.
      data: Folder of local data; None: the hub.
      limit: Number of rows per task, or a fraction of them below 1; None: all.
      prompts: "harness" or "trained" (`eval.tasks.build.TaskSettings`).
      num_fewshot: Number of examples before each question; None: the task's.
      max_new_tokens: Maximum new tokens of a completion; None: the task's.
      chat: Whether to apply the tokenizer's chat template to prompts.
      chat_template: File with a Jinja chat template; None: the tokenizer's own.
      system: System message of a chat.
      split_special_tokens: Whether control tokens in prompts are tokenized as characters; None: as
        in the run of `workdir`, or False.
      batch_size: Rows per batch.
      max_length: Maximum tokens of a text; None: the model's maximum.
      seed: Sampling seed.
      mesh: Device mesh.

    Raises:
      ValueError: A value is invalid, or settings are missing or contradict each other.
    """

    tasks: tuple[str, ...]
    workdir: Path | None = None
    url: str = ""
    model: str | None = None
    adapter: str | None = None
    merge: bool = False
    dtype: str = "float32"
    quantization: str | None = None
    output: Path | None = None
    data: Path | None = None
    limit: float | None = None
    prompts: str = "harness"
    num_fewshot: int | None = None
    max_new_tokens: int | None = None
    chat: bool = False
    chat_template: Path | None = None
    system: str = ""
    split_special_tokens: bool | None = None
    batch_size: int = 16
    max_length: int | None = None
    seed: int = 0
    mesh: MeshSettings = dataclasses.field(default_factory=MeshSettings)

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("no task is given; give --tasks, or --tasks=list to list them")
        if self.workdir is None and self.model is None and self.adapter is None:
            raise ValueError("no model is given; give --workdir, --model or --adapter")
        if self.workdir is not None and self.adapter is not None:
            raise ValueError(
                f"--adapter is {self.adapter!r}, but --workdir already names an adapter; omit one"
            )
        if self.workdir is not None and not self.workdir.is_dir():
            raise ValueError(f"--workdir is {self.workdir}, which is not a folder")
        if self.data is not None and not self.data.is_dir():
            raise ValueError(f"--data is {self.data}, which is not a folder")
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        if self.quantization is not None:
            check_choice("quantization", self.quantization, FORMATS)
        check_choice("prompts", self.prompts, ("harness", "trained"))
        check_positive_int("batch_size", self.batch_size)
        for name in ("max_new_tokens", "max_length"):
            if getattr(self, name) is not None:
                check_positive_int(name, getattr(self, name))
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot is {self.num_fewshot} but must be at least 0")
        if self.limit is not None and not (
            0 < self.limit < 1 or (self.limit >= 1 and float(self.limit).is_integer())
        ):
            raise ValueError(
                f"limit is {self.limit} but must be a number of rows, or a fraction of them below 1"
            )
        if self.system and not self.chat and "mt_bench" not in self.tasks:
            raise ValueError("--system is given without a chat; add --chat, or omit it")
        if self.chat_template is not None and not self.chat_template.is_file():
            raise ValueError(f"--chat_template is {self.chat_template}, which is not a file")

    @property
    def source(self) -> tuple[str | None, str | None]:
        """Returns the model and the adapter, either of which may be None.

        Raises:
          ValueError: The run's folder has neither, because the run is not finished.
        """
        if self.workdir is None:
            return self.model, self.adapter
        if (self.workdir / _ADAPTER).is_dir():
            return self.model, f"{self.url or self.workdir}/{_ADAPTER}"
        if (self.workdir / _MODEL).is_dir() and self.model is None:
            if self.url:
                where = f"{self.url}/{_MODEL}"
                raise ValueError(
                    f"{self.url} has no adapter, because its run trained the whole model; copy the"
                    f" model with `{copy_command(where)}`, and give it with --model={_MODEL}"
                )
            return str(self.workdir / _MODEL), None
        raise ValueError(
            f"{self.url or self.workdir} has neither {_ADAPTER}/ nor {_MODEL}/, which a run writes"
            " when it finishes; resume the run with its training command"
        )

    @property
    def output_folder(self) -> Path:
        """Returns the folder of the results."""
        if self.output is not None:
            return self.output
        if self.workdir is not None:
            return self.workdir / "eval"
        name = Path(self.adapter or self.model or "").expanduser().resolve().name
        return Path("runs", f"eval-{name}")

    @property
    def task_settings(self) -> TaskSettings:
        """Returns the settings that tasks are built with."""
        return TaskSettings(
            data=self.data,
            prompts=self.prompts,  # type: ignore[arg-type]
            num_fewshot=self.num_fewshot,
            max_new_tokens=self.max_new_tokens,
        )

    def identity(self) -> dict[str, Any]:
        """Returns the settings, besides model and prompts, that determine responses."""
        return {name: getattr(self, name) for name in ("merge", "dtype", "max_length", "seed")}

    def asked(self) -> dict[str, Any]:
        """Returns the further settings that determine a task's result."""
        names = ("limit", "prompts", "num_fewshot", "max_new_tokens", "chat", "system")
        asked = {name: getattr(self, name) for name in names}
        template = str(self.chat_template.resolve()) if self.chat_template else ""
        data = str(self.data.resolve()) if self.data else "hub"
        return {**asked, "chat_template": template, "data": data}
