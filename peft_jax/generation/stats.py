"""Measures the amount and speed of generation."""

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
    """Counts and seconds of one call, or the sum of several.

    Attributes:
      prompts: Number of prompts.
      prompt_tokens: Number of tokens of the prompts.
      new_tokens: Number of new tokens.
      batches: Number of batches.
      compile_seconds: Seconds of compilation for new buckets.
      prompt_seconds: Seconds of reading prompts.
      decode_seconds: Seconds of writing new tokens.

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
        """New tokens of all rows per second, without compilation; 0 if nothing ran."""
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
            f" {self.tokens_per_second:.1f} tokens/s (plus {self.compile_seconds:.1f} s compiling)"
        )


class Stopwatch:
    """Measures seconds by phase, with JAX's compilation as the separate phase "compile".

    Attributes:
      seconds: Seconds by phase so far.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds the block's seconds to `phase`, except compilation of at most one program."""
        spent: dict[str, float] = collections.defaultdict(float)

        def listen(event: str, duration_secs: float, **_: str | int) -> None:
            # JAX reports the traces of a program's parts before the whole, which includes them.
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
