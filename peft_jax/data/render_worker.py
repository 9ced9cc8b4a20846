"""Renders chat templates for `peft_jax.data.render`; run as a script, which imports little.

Reads a request from each line of the standard input and writes its answer to a line of the standard
output, both JSON. A text that takes more computing than it may ends the process by SIGPROF, which
nothing in a template can catch or delay; memory beyond the bound is a MemoryError.
"""

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template


def main() -> None:
    """Answers requests until there are no more; the arguments are the bounds."""
    seconds, memory, characters = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    # What stops a run's process group is for the run to act on; it may still need rows.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    _limit_memory(memory)
    for line in sys.stdin.buffer:
        try:
            answer = _render(json.loads(line), seconds, characters)
        except MemoryError:
            message = f"it takes more than {memory >> 20} MiB of memory"
            answer = {"error": "MemoryError", "message": message}
        except Exception as error:  # Whatever a template raises is the answer.
            answer = {"error": type(error).__name__, "message": str(error)[:2000]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode("ascii") + b"\n")
        sys.stdout.buffer.flush()


def _limit_memory(more: int) -> None:
    """Bounds the address space to what is in use now and `more` bytes, where the system tells."""
    usage = Path("/proc/self/statm")
    if usage.exists():
        limit = int(usage.read_text().split()[0]) * resource.getpagesize() + more
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _render(request: dict[str, Any], seconds: float, characters: int) -> dict[str, Any]:
    texts: list[str] = []
    marks: list[list[tuple[int, int]]] = []
    # Behind the annotation of a text stand the texts and their marks.
    render: Any = render_jinja_template
    for indices, generation_prompt, continued in request["wanted"]:
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
            raise ValueError(f"it writes {len(found[0]):,} characters, and at most {characters:,}")
        texts.append(found[0])
        marks.append(marked[0] if marked else [])
    return {"texts": texts, "marks": marks}


if __name__ == "__main__":
    main()
