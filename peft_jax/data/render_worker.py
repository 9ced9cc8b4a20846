"""Renders chat templates for `peft_jax.data.render`; run as a script, to import little.

Reads one JSON request per line of standard input and writes one JSON answer per line of standard
output. A text that exceeds the CPU limit ends the process by SIGPROF, which a template can neither
catch nor delay. Exceeding the memory limit raises MemoryError.
"""

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template


def main() -> None:
    """Answers requests until the input ends; the script's arguments are the limits."""
    seconds, memory, characters = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    # Signals to a run's process group are handled by the run, which may still need rows.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # A process that profiles itself may ignore or block it, and this one inherits that.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    _limit_memory(memory)
    for line in sys.stdin.buffer:
        try:
            answer = _render(json.loads(line), seconds, characters)
        except MemoryError:
            message = f"it takes more than {memory >> 20} MiB of memory"
            answer = {"error": "MemoryError", "message": message}
        except Exception as error:  # A template may raise any exception; it is the answer.
            answer = {"error": type(error).__name__, "message": str(error)[:2000]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode("ascii") + b"\n")
        sys.stdout.buffer.flush()


def _limit_memory(more: int) -> None:
    """Limits the address space to its present size plus `more` bytes, if /proc reports it."""
    usage = Path("/proc/self/statm")
    if usage.exists():
        limit = int(usage.read_text().split()[0]) * resource.getpagesize() + more
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _render(request: dict[str, Any], seconds: float, characters: int) -> dict[str, Any]:
    texts: list[str] = []
    marks: list[list[tuple[int, int]]] = []
    # The annotation says that it returns text, but it returns texts and marks.
    render: Any = render_jinja_template
    for indices, generation_prompt, continued in request["requests"]:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        found, marked = render(
            [[request["messages"][index] for index in indices]],
            tools=request["tools"],
            chat_template=request["source"],
            return_assistant_tokens_mask=request["marks"],
            add_generation_prompt=generation_prompt,
            continue_final_message=continued,
            **request["variables"],
        )
        if len(found[0]) > characters:
            raise ValueError(
                f"it writes {len(found[0]):,} characters, but the limit is {characters:,}"
            )
        texts.append(found[0])
        marks.append(marked[0] if marked else [])
    return {"texts": texts, "marks": marks}


if __name__ == "__main__":
    main()
