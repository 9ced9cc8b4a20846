"""Runs training from a configuration: start or resume, train, evaluate, save and report."""

import contextlib
import dataclasses
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from peft_jax.adapters import AdapterState
from peft_jax.core import Tree
from peft_jax.data import AnyBatch, UnusableRowsError
from peft_jax.parallel import on_mesh
from peft_jax.runtime.clock import Phases, Rate
from peft_jax.runtime.cpu_allocator import dispatch_inline, keep_freed_memory
from peft_jax.runtime.errors import BadDataError, NonFiniteError, StorageError
from peft_jax.runtime.files import locked, write_json
from peft_jax.runtime.interruption import Interruption
from peft_jax.runtime.pending import PendingMetrics, StepMetrics
from peft_jax.runtime.progress import Reporter, RewritingReporter, StepProgress
from peft_jax.training.bucket_workdir import WorkDirCopy, keep_copy
from peft_jax.training.checkpoints import Checkpoints
from peft_jax.training.compile_step import compile_step
from peft_jax.training.config import RunConfig
from peft_jax.training.evaluate import AnyEvaluator, make_evaluator
from peft_jax.training.export import (
    export_results,
    exports_adapter,
    exports_model,
)
from peft_jax.training.initial_arrays import initialize_adapter, load_base
from peft_jax.training.input_digests import Inputs, InputsReader, check_allowed, pin
from peft_jax.training.placement import check_processes, from_first
from peft_jax.training.prepare import Job, prepare
from peft_jax.training.program import Training
from peft_jax.training.report.metrics import (
    HELD_OUT,
    TRAIN,
    MetricsLog,
    Record,
    read_records,
)
from peft_jax.training.report.page import write_report
from peft_jax.training.report.summary import Totals, describe_data, summarize
from peft_jax.training.results_text import describe_results
from peft_jax.training.resume import Start, find_start
from peft_jax.training.run_log import open_log
from peft_jax.training.trainer import is_due
from peft_jax.training.workdir import WorkDir


def run(
    config: RunConfig,
    workdir: str | Path,
    *,
    reporter: Reporter | None = None,
    allow_changed: Collection[str] = (),
    params: Tree | None = None,
) -> dict[str, Any]:
    """Trains from `config`, resuming from the latest checkpoint if there is one.

    A stopped or finished run resumes if the configuration asks for more steps than it has taken.

    Args:
      config: Configuration of the run.
      workdir: Folder that everything is written to, or the URL of one in a bucket.
      reporter: Prints messages and progress. Default: the terminal.
      allow_changed: Inputs that may have changed since the run began, "base" or "data". Both are
        compared by content, and any other change is an error.
      params: Parameters of `config.model`, in its dtype and quantization, if they are loaded
        already.

    Returns:
      The summary, as in `summary.json`.

    Raises:
      RefusedError: The request is invalid, and nothing was done.
      InterruptedRunError: A signal stopped the run, which saved a checkpoint.
      NonFiniteError: The loss or the gradient is not finite.
      BadDataError: The run read an unusable row after the first step, and that is an error.
      StorageError: The work directory is no longer writable.
    """
    began = time.perf_counter()
    dispatch_inline()
    check_allowed(allow_changed)
    folder = WorkDir.at(workdir)
    reporter = reporter or Reporter(quiet=jax.process_index() != 0)
    if folder.url:
        reporter = RewritingReporter(reporter, folder.shown)
    check_processes(folder.path, config.to_mapping(), url=folder.url)
    with keep_copy(folder, say=reporter.warn) as copy:
        return _run_in(
            copy, config, reporter, began=began, allow_changed=allow_changed, params=params
        )


def _run_in(
    copy: WorkDirCopy,
    config: RunConfig,
    reporter: Reporter,
    *,
    began: float,
    allow_changed: Collection[str],
    params: Tree | None,
) -> dict[str, Any]:
    """Trains in a work directory whose local files are up to date; see `run`."""
    folder, first = copy.folder, jax.process_index() == 0
    folder.check(config)
    summary = from_first(folder.read_summary(say=reporter.warn) if first else None)
    if summary is not None and folder.is_as_long_as(config):
        lost = from_first(_list_lost(folder, config) if first else None)
        if not lost:
            _say_finished(folder, reporter)
            return summary
        reporter.warn(f"missing results are written again from the last checkpoint: {lost}")
    if first:
        folder.check_writable()
        folder.check_results(model=exports_model(config))
    phases = Phases()
    with phases("prepare"), InputsReader(config, reads=first) as reader:
        pinned = pin(config, folder.read_inputs(), allow_changed)
        job = prepare(config, say=reporter.warn, pinned=pinned, on_folder=reader.begin)
        read = reader.finish([*job.train.files, *job.held_out.files])
        inputs = Inputs.from_mapping(from_first(None if read is None else read.to_mapping()))
    with contextlib.ExitStack() as stack:
        stack.callback(job.train.close)
        if first:
            stack.enter_context(locked(folder.lock))
            folder.remove_unfinished(say=reporter.warn)
        for note in folder.check(config):
            reporter.warn(note)
        interruption = stack.enter_context(Interruption())
        checkpoints = stack.enter_context(copy.checkpoints(config.checkpoint))
        start = find_start(
            job,
            folder,
            checkpoints,
            inputs,
            finished=summary is not None,
            allowed=allow_changed,
            warn=reporter.warn,
        )
        stack.enter_context(_explaining_failures(folder, checkpoints))
        if first:
            folder.claim(config, inputs)
            copy.claim()
        stack.enter_context(on_mesh(job.mesh))
        return TrainingLoop(
            job, copy, reporter, interruption, checkpoints, phases, inputs, params, began
        ).go(start)


def _list_lost(folder: WorkDir, config: RunConfig) -> str:
    """Returns the missing results of a finished run as text; empty if none is missing."""
    lost = folder.lost_results(adapter=exports_adapter(config), model=exports_model(config))
    return ", ".join(map(str, lost))


def _say_finished(folder: WorkDir, reporter: Reporter) -> None:
    if not folder.metrics.is_file():
        reporter.warn(f"{folder.metrics} is missing; only {folder.report} has its metrics")
    reporter.say(f"this run is finished; see {folder.report / 'README.md'}")


@contextlib.contextmanager
def _explaining_failures(folder: WorkDir, checkpoints: Checkpoints) -> Iterator[None]:
    """Converts system errors while the run writes to a `StorageError` that says what to do."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of the terminal's output has left
    except (StorageError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.filename or folder.path}: {error.strerror}"
        with contextlib.suppress(StorageError):
            checkpoints.wait()
        steps = checkpoints.steps()
        last = f"the last checkpoint is {checkpoints.path(steps[-1])}" if steps else "no checkpoint"
        raise StorageError(
            f"{text} ({last}). Remove the cause; the same command then resumes the run"
        ) from error


class TrainingLoop:
    """One process of a run, from its first array to its report."""

    def __init__(
        self,
        job: Job,
        copy: WorkDirCopy,
        reporter: Reporter,
        interruption: Interruption,
        checkpoints: Checkpoints,
        phases: Phases,
        inputs: Inputs,
        params: Tree | None,
        began: float,
    ):
        self._job = job
        self._began: float | None = began
        self._seconds_before: Mapping[str, float] = {}
        self._params = params
        self._inputs = inputs
        self._config = job.config
        self._copy = copy
        self._folder = copy.folder
        self._reporter = reporter
        self._interruption = interruption
        self._checkpoints = checkpoints
        self._phases = phases
        self._pending = PendingMetrics()
        self._totals = Totals()
        self._rate = Rate(now=lambda: phases.spent("train") + phases.spent("data"))
        self._saved: int | None = None
        self._first = jax.process_index() == 0

    def go(self, start: Start) -> dict[str, Any]:
        """Loads the weights, trains, and writes results and report."""
        self._reporter.say(self._job.table)
        self._reporter.say(describe_data(self._job))
        saved = start.saved
        if saved is not None:
            self._phases.add(saved["seconds"])
            self._seconds_before = saved["seconds"]
            self._totals = Totals(**saved["totals"])
            self._saved = start.step
            self._reporter.say(f"resuming from step {start.step} of {self._job.steps}")
        with self._phases("load"):
            arrays = self._load(start.adapter)
        with self._phases("compile"):
            step = compile_step(self._job, self._totals, warn=self._reporter.warn)
        evaluator = make_evaluator(self._job)
        keep_freed_memory()
        with self._open_log(start) as self._log:
            self._train(arrays, step, evaluator)
            return self._finish(arrays)

    # Before the first step.

    def _load(self, given: AdapterState | None) -> Training:
        """Restores the arrays of a checkpoint, or initializes those of a new run.

        Args:
          given: Adapter to start from without a checkpoint; None for a new one.
        """
        params = load_base(self._job, self._params)
        frozen = self._job.spec.frozen(params)
        if self._saved is not None:
            abstract = {"state": self._job.state, "constant": self._job.constant}
            arrays = self._checkpoints.read_arrays(self._saved, abstract)
            return Training(frozen=frozen, constant=arrays["constant"], state=arrays["state"])
        with self._phases("initialize"):
            adapter = self._new_adapter(params) if given is None else self._place(given)
            state = self._job.make_state(adapter.trainable)
        return Training(frozen=frozen, constant=adapter.constant, state=state)

    def _new_adapter(self, params: Tree) -> AdapterState:
        return initialize_adapter(
            self._job, params, microbatches=self._first_microbatches, say=self._reporter.say
        )

    def _place(self, given: AdapterState) -> AdapterState:
        """Shards an adapter's arrays over the devices."""
        self._reporter.say(f"starting from the adapter in {self._config.adapter.path}")
        return self._job.place(given)

    def _first_microbatches(self) -> list[AnyBatch]:
        """Returns the first microbatches of the stream, and rewinds it afterwards."""
        before = self._job.train.get_state()
        batches = [self._next_batch() for _ in range(self._job.init_batches)]
        self._job.train.set_state(before)
        return self._job.init_microbatches(batches)

    def _open_log(self, start: Start) -> MetricsLog:
        sink = self._copy.records_sink() if self._first else None
        return open_log(
            self._config,
            self._folder,
            start,
            extra_sinks=() if sink is None else (sink,),
            warn=self._reporter.warn,
        )

    # Step by step.

    def _train(self, arrays: Training, step: Any, evaluator: AnyEvaluator) -> None:
        """Takes the remaining steps, with the evaluations and checkpoints that are due."""
        train, steps = self._config.train, self._job.steps
        done = self._saved or 0
        if evaluator.empty:
            self._reporter.warn("there are no held-out rows, so only the training loss is measured")
        with self._phases("train"), self._reporter.steps(steps, done=done) as progress:
            self._between_steps(done, arrays, evaluator)
            while done < steps:
                with self._phases("data"):
                    batch = self._next_batch()
                placed = self._job.placement.put_microbatches(batch, train.gradient_accumulation)
                arrays.state, metrics = step(arrays.state, arrays.frozen, arrays.constant, placed)
                done += 1
                tokens = int(np.count_nonzero(batch.segment_ids))
                self._totals.tokens += tokens
                self._pending.put(done, metrics, tokens)
                progress.advance(done)
                self._note(self._pending.ready(), progress)
                self._between_steps(done, arrays, evaluator, progress)

    def _next_batch(self) -> AnyBatch:
        """Returns the next batch of the training stream.

        Raises:
          BadDataError: A row is unusable, and the settings make that an error, or all rows are.
        """
        try:
            return next(self._job.train)
        except UnusableRowsError as error:
            last, again = self._saved, ""
            if last is not None:
                again = (
                    f"\nThe same command resumes from {self._checkpoints.path(last)}, also with"
                    " another data.on_bad_row; other data settings need another --workdir"
                )
            raise BadDataError(f"{error}{again}") from error

    def _between_steps(
        self,
        done: int,
        arrays: Training,
        evaluator: AnyEvaluator,
        progress: StepProgress | None = None,
    ) -> None:
        """Evaluates, saves and stops as due after `done` steps."""
        steps, stop = self._job.steps, self._interruption.requested(done)
        ends = done in (0, steps)
        measure = ends or is_due(done, self._config.evaluate.every)
        save = ends or is_due(done, self._config.checkpoint.every)
        if not (measure or save or stop):
            return
        self._note(self._pending.drain(), progress)
        if measure and not stop and not evaluator.empty and not self._log.has(done, HELD_OUT):
            with self._phases("evaluate"):
                measured = evaluator(
                    arrays.frozen,
                    arrays.adapter,
                    stop=self._interruption.requested_between_steps,
                )
            if measured is not None:
                self._log.write({"step": done, "split": HELD_OUT, **measured})
                self._reporter.say(f"step {done}: held-out loss {measured['loss']:.4f}")
        stop = stop or self._interruption.requested_between_steps()
        if (save or stop) and self._saved != done:
            with self._phases("checkpoint"):
                self._save(done, arrays)
        if stop:
            self._checkpoints.wait()
            raise self._interruption.error(
                f"stopped by a signal after step {done} of {steps}; the same command resumes from "
                f"{self._checkpoints.path(done)}"
            )

    def _save(self, done: int, arrays: Training) -> None:
        """Starts writing a checkpoint, once every record up to it is on disk."""
        self._log.sync()
        self._checkpoints.save(
            done,
            {"state": arrays.state, "constant": arrays.constant},
            {
                "step": done,
                "steps": self._job.steps,
                "inputs": self._inputs.to_mapping(),
                "records": len(self._log.present),
                "held_out": self._log.held_out,
                "config": self._config.to_mapping(),
                "data": self._job.train.get_state(),
                "seconds": self._phases.seconds,
                "totals": dataclasses.asdict(self._totals),
            },
        )
        self._saved = done

    def _note(self, steps: Iterator[StepMetrics], progress: StepProgress | None) -> None:
        """Logs the metrics of finished steps.

        Raises:
          NonFiniteError: A loss or gradient is not finite; later steps are not logged.
        """
        for step, metrics, tokens in steps:
            self._rate.add(tokens)
            timing = self._note_first(step)
            finite = bool(metrics["finite"])
            if "clip_factor" in metrics:
                self._totals.count_clipping(metrics["clip_factor"])
            due = step in (1, self._job.steps) or is_due(step, self._config.logging.every)
            if due or not finite:
                record = self._record(step, jax.device_get(metrics))
                record["timing"] |= timing
                self._log.write(record)
            if not finite:
                raise NonFiniteError(self._explain_non_finite(step, metrics))
            if due and progress is not None:
                progress.show(
                    step, loss=float(metrics["loss"]), tokens_per_second=self._rate.per_second
                )

    def _note_first(self, step: int) -> dict[str, float]:
        """Prints the time to the first step of this part of the run, and returns it once."""
        if self._began is None:
            return {}
        seconds = round(time.perf_counter() - self._began, 3)
        self._began = None
        if step == 1:
            self._totals.seconds_to_first_step = seconds
        phases = ", ".join(
            f"{name} {spent - self._seconds_before.get(name, 0.0):.1f}"
            for name, spent in self._phases.seconds.items()
        )
        self._reporter.say(f"first step finished after {seconds:.1f} s ({phases})")
        return {"seconds_to_first_step": seconds}

    def _record(self, step: int, metrics: dict[str, Any]) -> Record:
        measured = {name: value for name, value in metrics.items() if name != "finite"}
        return {
            "step": step,
            "split": TRAIN,
            **measured,
            "clipped": self._totals.clipped_share,
            "timing": {
                "seconds": round(self._phases.spent("train"), 3),
                "tokens_per_second": round(self._rate.per_second, 1),
            },
        }

    def _explain_non_finite(self, step: int, metrics: dict[str, Any]) -> str:
        last = self._saved
        good = "there is none" if last is None else str(self._checkpoints.path(last))
        return (
            f"step {step} is not finite: the loss is {float(metrics['loss']):.6g} and the gradient"
            f" norm {float(metrics['grad_norm']):.6g} (last good checkpoint: {good}). The same"
            " command would fail at the same step: with another --workdir, lower"
            " train.learning_rate or optimizer.clip_norm, or check the data of that step"
        )

    # After the last step.

    def _finish(self, arrays: Training) -> dict[str, Any]:
        """Writes results, report and summary."""
        with self._phases("export"):
            self._checkpoints.wait()
            export_results(self._job, self._folder, arrays.frozen, arrays.adapter)
        records = read_records(self._folder.metrics)
        summary = summarize(self._job, records, self._phases.seconds, self._totals)
        if self._first:
            write_report(
                self._folder.report,
                summary=summary,
                config=self._config.to_mapping(),
                records=records,
                table=self._job.table,
            )
            # Written last, because its presence marks the run as finished.
            write_json(self._folder.summary, summary)
            self._copy.finish()
        for text in describe_results(summary, self._config, self._folder):
            self._reporter.say(text)
        return summary
