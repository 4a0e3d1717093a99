"""The process that renders chat templates: a line of JSON in, a line of JSON out. Run as a file, by `chat_template`.

A template is part of a model, and not trusted. transformers' sandbox keeps it from running other code, but not from
looping for ever or filling the memory, also in a single operation that no other thread can interrupt, such as
`10**(10**10)`. A process can be ended; and it ends by itself where its parent is killed.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any


def main(seconds: int, memory: int) -> None:
    """Answer requests until the input ends: {"template", "messages", "variables"} → {"text"} or {"error"}."""
    from transformers.utils.chat_template_utils import render_jinja_template

    answers, sys.stdout = sys.stdout, sys.stderr
    _limit_memory(memory)
    print("{}", file=answers, flush=True)  # ready: what came before is not the template's time
    for line in sys.stdin:
        _limit_time(seconds)
        try:
            answer = {"text": _render(render_jinja_template, json.loads(line))}
        except MemoryError:
            answer = {"error": f"it takes more than {memory >> 20} MiB"}
        except Exception as error:  # what the template itself raises, and jinja2 where it meets another type
            answer = {"error": f"{error or type(error).__name__}"}
        print(json.dumps(answer), file=answers, flush=True)


def _render(render: Any, request: dict[str, Any]) -> str:
    rendered, _ = render(
        conversations=[request["messages"]],
        chat_template=request["template"],
        add_generation_prompt=True,
        **request["variables"],
    )
    text: str = rendered[0]
    if len(text) > request["longest"]:
        raise ValueError(f"it makes {len(text)} characters of them; accepted are up to {request['longest']}")
    return text


def _limit_memory(more: int) -> None:
    """Of addresses, beyond what is in use now; where the system can."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm", encoding="ascii") as sizes:
            used = int(sizes.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.RLIM_INFINITY))


def _limit_time(seconds: int) -> None:
    """Of the processor, from now on: for the case that there is no parent any more to look at the clock."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + seconds + 1, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
