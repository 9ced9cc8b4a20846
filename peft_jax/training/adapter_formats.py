"""Exports an adapter as a merged model, for Hugging Face PEFT, or as a LoRA adapter near it."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from peft_jax.adapters import AdapterSpec, AdapterState, LoRAApproximation, approximate_by_lora
from peft_jax.core import Tree, flatten
from peft_jax.core.validation import check_choice, check_positive_int
from peft_jax.generation.loading import base_of
from peft_jax.hub import (
    export_merged,
    find_folder,
    load_adapter,
    load_params,
    read_config,
    save_adapter,
)
from peft_jax.hub.adapter_base import recorded_quantization
from peft_jax.hub.adapter_files import ARRAYS, CONFIG, PEFT_CONFIG, read_spec
from peft_jax.hub.model_card import ModelCard, write_card
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.hub.vllm import RANKS, vllm_note
from peft_jax.models import CausalLM, build_model
from peft_jax.runtime.buckets import is_bucket
from peft_jax.runtime.errors import RefusedError
from peft_jax.runtime.files import atomic_folder, read_json_object
from peft_jax.training.fine_tuning import TrainingResult
from peft_jax.training.held_out import HeldOutLoss, held_out_loss
from peft_jax.training.workdir import WorkDir

FORMATS = ("merged", "peft", "lora")

DTYPES = ("bfloat16", "float16", "float32")

WITHIN = 0.005
"""Relative increase of the held-out loss that rank "auto" accepts."""

_GENERATION_CONFIG = "generation_config.json"

_GGUF = (
    "gguf is written by llama.cpp from a merged checkpoint: export with --format=merged"
    " --output=FOLDER, then run llama.cpp's convert_hf_to_gguf.py FOLDER"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """What `export_adapter` has written.

    Attributes:
      folder: Output folder.
      format: Format, one of `FORMATS`.
      rank: Rank of the LoRA adapter for format "lora"; otherwise None.
      errors: Relative error of the LoRA adapter's kernels by module, as `LoRAApproximation` has it.
      loss_before: Held-out loss of the adapter, in nats per target; None if not measured.
      loss_after: Held-out loss of the LoRA adapter; None if not measured.
      notes: Sentences on what was measured, and on who loads the result.
    """

    folder: Path
    format: str
    rank: int | None = None
    errors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    loss_before: float | None = None
    loss_after: float | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """Adapter to export, and what it was trained on.

    Attributes:
      folder: Folder of the adapter.
      workdir: Work directory of its run; None if unknown.
      base: Name of the base model.
      base_folder: Folder of the base model.
      model: Base model, without parameters.
      moved: Folder of the base model as given, instead of the adapter's own; None otherwise.
    """

    folder: Path
    workdir: Path | None
    base: str
    base_folder: Path
    model: CausalLM
    moved: str | None

    @property
    def dtype(self) -> str:
        """Dtype that the base model's configuration gives, or float32."""
        config = read_config(self.base_folder)
        named = config.get("dtype") or config.get("torch_dtype")
        return named if named in DTYPES else "float32"

    @property
    def quantization(self) -> str:
        """Format of the base's kernels, to which an adapter that corrects it belongs."""
        file = self.folder / CONFIG
        if not file.is_file():
            return "none"
        spec = read_spec(read_json_object(file), file)
        recorded = recorded_quantization(self.folder) if spec.method.corrects_quantization else None
        return recorded or "none"

    def load_base(self, dtype: str) -> Tree:
        """Loads the parameters of the base."""
        return load_params(
            self.base_folder, self.model, dtype=dtype, quantization=self.quantization
        )

    def finish(
        self,
        folder: Path,
        spec: AdapterSpec,
        *,
        kind: Literal["model", "adapter"],
        notes: tuple[str, ...] = (),
    ) -> None:
        """Writes the tokenizer and the model card to a folder."""
        own = (self.folder / "tokenizer_config.json").is_file()
        load_tokenizer(self.folder if own else self.base_folder).save_pretrained(folder)
        run, summary = (
            read_json_object(file) if file is not None and file.is_file() else {}
            for file in (
                None if self.workdir is None else self.workdir / name
                for name in ("config.json", "summary.json")
            )
        )
        card = ModelCard(
            kind=kind,
            base=self.base,
            base_folder=self.base_folder,
            spec=spec,
            run=run,
            summary=summary,
            notes=notes,
        )
        write_card(folder, card)


def export_adapter(
    source: TrainingResult | str | Path,
    output: str | Path,
    *,
    format: str = "merged",
    rank: int | Literal["auto"] | None = None,
    model: str | None = None,
    dtype: str | None = None,
) -> Exported:
    """Exports an adapter for other tools, with its tokenizer and a model card.

    Formats:

    - "merged": the base model with the adapter merged into it, for transformers and vLLM. It works
      for every method. `generation_config.json` of the base is copied.
    - "peft": an adapter for Hugging Face PEFT, if PEFT has the method.
    - "lora": the LoRA adapter of `rank` that is nearest to an adapter of any method, for PEFT and
      vLLM; see
      [`approximate_by_lora`][peft_jax.adapters.lora_approximation.approximate_by_lora]. If `source`
      is a run, the loss on its held-out rows is measured before and after.

    The base model is loaded without quantization, unless the adapter corrects its errors.

    Args:
      source: Result of `train`, the work directory of a finished run, or the folder of an adapter
        or its name on the hub.
      output: Folder to write to; it must be new or empty.
      format: Format.
      rank: Rank for format "lora". "auto" finds the least rank of vLLM's (8, 16, 32, 64, 128, 256,
        320, 512) whose loss on the run's held-out rows is at most 0.5% above the adapter's.
      model: Folder of the base model, or its name on the hub. Default: the adapter's own.
      dtype: Dtype of a merged model. Default: that of the base model's `config.json`.

    Raises:
      ValueError: A setting is invalid; the adapter or its base cannot be loaded; PEFT has no such
        method; or no rank is sufficient.
    """
    output = Path(output)
    _check_settings(format, rank, dtype)
    workdir = _workdir_of(source)
    given = source if workdir is None else adapter_of_run(workdir)
    assert not isinstance(given, TrainingResult)
    folder = find_folder(given)
    check_output(output, folder)
    base = model or base_of(folder)
    base_folder = find_folder(base)
    built = dataclasses.replace(build_model(read_config(base_folder)), origin=str(base_folder))
    found = _Source(
        folder=folder,
        workdir=workdir,
        base=base,
        base_folder=base_folder,
        model=built,
        moved=model,
    )
    if format == "merged":
        return _export_merged(found, output, dtype or found.dtype)
    if format == "peft":
        return _export_peft(found, output)
    assert rank is not None
    return _export_lora(found, output, rank)


def adapter_of_run(workdir: str | Path) -> str | Path:
    """Returns the folder, or the location in a bucket, of a run's adapter.

    Raises:
      ValueError: The run has no adapter.
    """
    if is_bucket(str(workdir)):
        return f"{str(workdir).rstrip('/')}/adapter"
    adapter = Path(workdir) / "adapter"
    if adapter.is_dir():
        return adapter
    if (whole := Path(workdir) / "model").is_dir():
        raise ValueError(
            f"{workdir} has no adapter, because its run trained the whole model; use {whole}"
        )
    raise ValueError(
        f"{workdir} has no adapter/, which a run writes when it finishes; resume the run with its"
        " training command"
    )


def check_output(output: Path, adapter: Path) -> None:
    """Raises ValueError if an output folder is not empty, or is the adapter's own."""
    if output.is_file():
        raise ValueError(f"--output is {output}, which is a file; give a folder")
    if output.resolve() == adapter.resolve():
        raise ValueError(f"--output is {output}, the adapter itself; give another folder")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(
            f"--output is {output}, which holds {next(output.iterdir()).name}; give a new folder"
        )


def _check_settings(format_: str, rank: Any, dtype: str | None) -> None:
    if format_ == "gguf":
        raise ValueError(_GGUF)
    check_choice("format", format_, FORMATS)
    if format_ == "lora":
        if rank is None:
            raise ValueError('format "lora" needs a rank; give --rank=16, or --rank=auto')
        if rank != "auto":
            check_positive_int("rank", rank)
    elif rank is not None:
        raise ValueError(f'rank is {rank}, but format {format_!r} has no rank; give format "lora"')
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
        if format_ != "merged":
            raise ValueError(
                f"dtype is {dtype!r}, but only a merged model is converted; omit it for format"
                f" {format_!r}"
            )


def _workdir_of(source: TrainingResult | str | Path) -> Path | None:
    """Returns the work directory of a run; None for an adapter."""
    if isinstance(source, TrainingResult):
        return source.workdir
    folder = Path(source).expanduser()
    is_adapter = any((folder / name).is_file() for name in (CONFIG, PEFT_CONFIG))
    return folder if folder.is_dir() and not is_adapter else None


def _export_merged(source: _Source, output: Path, dtype: str) -> Exported:
    params = source.load_base(dtype)
    spec, state = load_adapter(source.folder, source.model, params)
    with atomic_folder(output) as temporary:
        export_merged(temporary, source.model, params, spec, state, dtype=dtype)
        if (source.base_folder / _GENERATION_CONFIG).is_file():
            shutil.copyfile(source.base_folder / _GENERATION_CONFIG, temporary / _GENERATION_CONFIG)
        source.finish(temporary, spec, kind="model")
    return Exported(folder=output, format="merged")


def _export_peft(source: _Source, output: Path) -> Exported:
    spec, state = load_adapter(source.folder, source.model, source.model.abstract_params())
    with atomic_folder(output) as temporary:
        note = _write_peft(temporary, source, spec, state)
        source.finish(temporary, spec, kind="adapter")
    return Exported(folder=output, format="peft", notes=(note,))


def _write_peft(folder: Path, source: _Source, spec: AdapterSpec, state: AdapterState) -> str:
    """Writes PEFT's two files, and returns a sentence on vLLM.

    Raises:
      ValueError: PEFT has no such method.
    """
    save_adapter(folder, source.model, spec, state, source.base)
    form = read_json_object(folder / CONFIG)["peft"]
    if not form["loads"]:
        raise ValueError(f"{source.folder} cannot be written for PEFT: {form['why']}")
    for name in (CONFIG, ARRAYS):
        (folder / name).unlink(missing_ok=True)
    return vllm_note(read_json_object(folder / PEFT_CONFIG))


def _export_lora(source: _Source, output: Path, rank: int | Literal["auto"]) -> Exported:
    measure: HeldOutLoss | None = None
    notes: list[str] = []
    try:
        measure = _measure(source)
    except RefusedError as error:
        if rank == "auto":
            raise ValueError(f"rank auto needs a held-out loss: {error}") from error
        notes.append(f"The held-out loss was not measured: {error}.")
    params = source.load_base(source.dtype)
    spec, state = load_adapter(source.folder, source.model, params)
    before = None if measure is None else measure(params, spec, state)
    after = None
    if rank == "auto":
        assert measure is not None
        assert before is not None
        lora, after = _least_rank(measure, before, params, spec, state)
    else:
        lora = approximate_by_lora(spec, params, state, rank=rank)
        if measure is not None:
            after = measure(params, lora.spec, lora.state)
    found = lora.spec.method.rank  # type: ignore[attr-defined]
    worst = max(lora.errors, key=lambda module: lora.errors[module])
    if lora.errors[worst]:
        notes.append(
            f"It is a LoRA of rank {found} near an adapter of the method {spec.method.name!r}. The"
            f" largest relative error of a module is {lora.errors[worst]:.2%}, in {worst}."
        )
    else:
        notes.append(f"It is a LoRA of rank {found} that equals the adapter.")
    if before is not None:
        notes.append(f"The held-out loss is {after:.4f}, and the adapter's is {before:.4f}.")
    with atomic_folder(output) as temporary:
        on_vllm = _write_peft(temporary, source, lora.spec, lora.state)
        source.finish(temporary, spec, kind="adapter", notes=(*notes, on_vllm))
    return Exported(
        folder=output,
        format="lora",
        rank=found,
        errors=lora.errors,
        loss_before=before,
        loss_after=after,
        notes=(*notes, on_vllm),
    )


def _measure(source: _Source) -> HeldOutLoss:
    """Returns the function that measures the held-out loss.

    Raises:
      RefusedError: The run or its rows are not found.
    """
    if source.workdir is None:
        raise RefusedError(
            f"{source.folder} is an adapter without its run; give the run's work directory"
        )
    return held_out_loss(WorkDir.at(source.workdir), model=source.moved)


def _least_rank(
    measure: HeldOutLoss, before: float, params: Tree, spec: AdapterSpec, state: AdapterState
) -> tuple[LoRAApproximation, float]:
    """Returns the approximation of the least sufficient rank, and its held-out loss.

    Raises:
      ValueError: No rank is sufficient.
    """
    flat = flatten(params)
    most = min(max(flat[path].shape[-2:]) for path in spec.targets(params).adapted)
    tried = []
    for rank in (rank for rank in RANKS if rank <= most):
        lora = approximate_by_lora(spec, params, state, rank=rank)
        after = measure(params, lora.spec, lora.state)
        if after <= before * (1 + WITHIN):
            return lora, after
        tried.append(f"{after:.4f} at rank {rank}")
    raise ValueError(
        f"no rank of vLLM's brings the held-out loss within {WITHIN:.1%} of the adapter's"
        f" {before:.4f}: {', '.join(tried) or f'no kernel has a rank of {RANKS[0]}'}; use"
        " --format=merged, or give the rank"
    )
