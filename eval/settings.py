"""What one evaluation is, checked before anything is loaded."""

import dataclasses
from pathlib import Path
from typing import Any

from peft_jax.core import FORMATS
from peft_jax.core.validation import check_choice, check_positive_int
from peft_jax.parallel import MeshSettings

from .tasks.build import TaskSettings

_ADAPTER, _MODEL = "adapter", "model"
"""What of a run's folder is evaluated, in this order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What is evaluated, on what, and how.

    Attributes:
      tasks: names of suites and tasks (`eval.tasks.names`).
      workdir: a finished run's folder; its adapter is evaluated on the base it was made for, or its
        whole model where it left that alone.
      model: a checkpoint's folder, or its name on the hub; with `workdir` or `adapter`, the base.
      adapter: an adapter's folder, or its name on the hub.
      merge: whether the adapter is merged into the parameters or bound to them.
      dtype: of parameters and computation, "float32" or "bfloat16".
      quantization: how the base's kernels are held, "none", "int8" or "nf4"; None: as they were
        while the adapter was trained, else "none".
      output: where results go; None: eval/ in the run's folder, or runs/eval-NAME.
      data: a folder of local data; None: the hub.
      limit: so many rows of each task, or a share of them below 1; None: all.
      prompts: "harness" or "trained" (`eval.tasks.build.TaskSettings`).
      num_fewshot: how many examples are put before each question; None: as the task says.
      max_new_tokens: the most new tokens of an answer; None: as the task says.
      chat: put the tokenizer's chat template around prompts.
      chat_template: a file with a Jinja chat template, used in place of the tokenizer's own.
      system: in a chat, what the system says first.
      split_special_tokens: tokenize control tokens in prompts as the characters that they are;
        None: as the run in `workdir` was trained, else False.
      batch_size: rows of a batch.
      max_length: the longest text in tokens; None: what the model was made for.
      seed: of sampling.
      mesh: how the devices share the work.

    Raises:
      ValueError: a value that cannot be, or too little or too much is given.
    """

    tasks: tuple[str, ...]
    workdir: Path | None = None
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
            raise ValueError("no task is named: give --tasks, or --tasks=list for what there is")
        if self.workdir is None and self.model is None and self.adapter is None:
            raise ValueError("give what is to be evaluated: --workdir, --model or --adapter")
        if self.workdir is not None and self.adapter is not None:
            raise ValueError("--workdir names the adapter already: leave --adapter out")
        if self.workdir is not None and not self.workdir.is_dir():
            raise ValueError(f"--workdir: there is no folder {self.workdir}")
        if self.data is not None and not self.data.is_dir():
            raise ValueError(f"--data: there is no folder {self.data}")
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        if self.quantization is not None:
            check_choice("quantization", self.quantization, FORMATS)
        check_choice("prompts", self.prompts, ("harness", "trained"))
        check_positive_int("batch_size", self.batch_size)
        for name in ("max_new_tokens", "max_length"):
            if getattr(self, name) is not None:
                check_positive_int(name, getattr(self, name))
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot must be at least 0, but is {self.num_fewshot}")
        if self.limit is not None and not (
            0 < self.limit < 1 or (self.limit >= 1 and float(self.limit).is_integer())
        ):
            raise ValueError(
                f"limit must be a number of rows, or a share of them below 1, but is {self.limit}"
            )
        if self.system and not self.chat and "mt_bench" not in self.tasks:
            raise ValueError("--system is what the system says in a chat: give --chat as well")
        if self.chat_template is not None and not self.chat_template.is_file():
            raise ValueError(f"--chat_template: there is no file {self.chat_template}")

    @property
    def source(self) -> tuple[str | None, str | None]:
        """The model and the adapter, either of which may be None.

        Raises:
          ValueError: the run's folder has neither, as it is not finished.
        """
        if self.workdir is None:
            return self.model, self.adapter
        if (self.workdir / _ADAPTER).is_dir():
            return self.model, str(self.workdir / _ADAPTER)
        if (self.workdir / _MODEL).is_dir() and self.model is None:
            return str(self.workdir / _MODEL), None
        raise ValueError(
            f"{self.workdir} has no {_ADAPTER}/, nor a {_MODEL}/ to evaluate in its place: a run"
            " leaves them when it is finished (train.py with the same --workdir goes on with it)"
        )

    @property
    def output_folder(self) -> Path:
        """Where results go."""
        if self.output is not None:
            return self.output
        if self.workdir is not None:
            return self.workdir / "eval"
        name = Path(self.adapter or self.model or "").expanduser().resolve().name
        return Path("runs", f"eval-{name}")

    @property
    def task_settings(self) -> TaskSettings:
        """What decides how tasks are built."""
        return TaskSettings(
            data=self.data,
            prompts=self.prompts,  # type: ignore[arg-type]
            num_fewshot=self.num_fewshot,
            max_new_tokens=self.max_new_tokens,
        )

    def identity(self) -> dict[str, Any]:
        """What answers depend on besides the model and the prompts, as JSON can hold it."""
        return {name: getattr(self, name) for name in ("merge", "dtype", "max_length", "seed")}

    def asked(self) -> dict[str, Any]:
        """What a task's result depends on besides, as JSON can hold it."""
        names = ("limit", "prompts", "num_fewshot", "max_new_tokens", "chat", "system")
        asked = {name: getattr(self, name) for name in names}
        template = str(self.chat_template.resolve()) if self.chat_template else ""
        data = str(self.data.resolve()) if self.data else "hub"
        return {**asked, "chat_template": template, "data": data}
