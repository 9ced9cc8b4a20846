"""How much was generated, and how fast."""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterator

import jax

_TRACED = "/jax/core/compile/jaxpr_trace_duration"
_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationStats:
    """Counts and seconds of one call, or of several added up.

    Attributes:
      prompts: how many prompts were continued.
      prompt_tokens: their tokens.
      new_tokens: the tokens they were continued by.
      batches: in how many batches.
      compile_seconds: making the programs for buckets that had not come before.
      prompt_seconds: reading the prompts.
      decode_seconds: writing the new tokens.

    Example:
      >>> one = GenerationStats(prompts=2, new_tokens=90, prompt_seconds=1.0, decode_seconds=2.0)
      >>> (one + one).tokens_per_second
      30.0
    """

    prompts: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    batches: int = 0
    compile_seconds: float = 0.0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second of running, of all rows together; 0 where nothing ran."""
        seconds = self.prompt_seconds + self.decode_seconds
        return self.new_tokens / seconds if seconds else 0.0

    def __add__(self, other: "GenerationStats") -> "GenerationStats":
        names = (field.name for field in dataclasses.fields(self))
        return GenerationStats(
            **{name: getattr(self, name) + getattr(other, name) for name in names}
        )

    def __str__(self) -> str:
        seconds = self.prompt_seconds + self.decode_seconds
        return (
            f"{self.new_tokens} tokens for {self.prompts} prompts in {seconds:.2f} s:"
            f" {self.tokens_per_second:.1f} tokens/s (and {self.compile_seconds:.1f} s compiling)"
        )


class Stopwatch:
    """Seconds by phase, those in which JAX compiles apart, as the phase "compile".

    Attributes:
      seconds: what was spent so far.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Counts the block's seconds to `phase`, less what it compiles: one program at most."""
        spent: dict[str, float] = collections.defaultdict(float)

        def listen(event: str, duration_secs: float, **_: str | int) -> None:
            # The traces of a program's parts are reported before the whole, which includes them.
            others = 0.0 if event == _TRACED else spent[event]
            spent[event] = others + duration_secs

        jax.monitoring.register_event_duration_secs_listener(listen)
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            compiled = spent[_TRACED] + spent[_LOWERED] + spent[_COMPILED]
            jax.monitoring.unregister_event_duration_listener(listen)
            self.seconds["compile"] += compiled
            self.seconds[phase] += elapsed - compiled
