"""Why torch.export refuses a model, and where, in the words of the model's owner."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

from torch.fx import Node

from teq_graph.errors import one_line

# What torch.export says of a program -> what it means to the owner of a model.
_MEANINGS = (
    (
        r"Found <class '[\w.]*?(?P<type>\w*Cache)'> in output",
        "its result has a {type}, which holds more than tensors: accepted is use_cache=False",
    ),
    (r"data-dependent|GuardOnDataDependent|PendingUnbacked", "its control flow or its sizes depend on tensors' values"),
    (
        r"marked L\['input_ids'\]\.size\(\)\[1\] as dynamic but your code specialized it to be a constant "
        r"\((?P<value>\d+)\)",
        "its Python depends on the number of tokens, as a loop over them does: the graph would take {value} alone",
    ),
    (
        r"export 0/1 specialized due to hint of (?P<value>\d) for dimension inputs(?P<name>.+)\.shape\[(?P<axis>\d+)\]",
        "example_inputs{name} has size {value} on axis {axis}, which torch.export takes for a constant: accepted where "
        "dynamic_shapes says any size is 2 or more",
    ),
    (
        r"marked (?P<size>\S+) as dynamic but your code specialized it to be a constant \((?P<value>[01])\)",
        "example_inputs have {size} = {value}, which torch.export takes for a constant: accepted where dynamic_shapes "
        "says any size is 2 or more",
    ),
    (
        r"marked (?P<size>\S+) as dynamic but your code specialized it to be a constant \((?P<value>\d+)\)",
        "the model takes {size} = {value} only, which dynamic_shapes says can be any size",
    ),
)


def why(error: BaseException) -> str:
    """Why, without torch's advice on how to change its own calls: the meaning where it is known, otherwise the lines
    that torch names below a headline, or the first paragraph."""
    text = str(error)
    for pattern, meaning in _MEANINGS:
        if found := re.search(pattern, text):
            return meaning.format(**found.groupdict())
    causes = [line.strip(" -") for line in text.splitlines() if line.lstrip().startswith("- ")]
    return causes[0] if causes else one_line(error)


def location(node: Node) -> str:
    """The line of the model that `node` comes from, where torch noted it."""
    frames = re.findall(r'File "([^<].+?)", line (\d+)', node.meta.get("stack_trace") or "")
    return f" at {Path(frames[-1][0]).name}:{frames[-1][1]}" if frames else ""


def where(error: BaseException) -> str:
    """The innermost module (or frame outside torch) where tracing stopped."""
    frames = traceback.extract_tb(error.__traceback__)
    user = [frame for frame in frames if not {"torch", "teq_graph"} & set(Path(frame.filename).parts)]
    user = [frame for frame in user if not frame.filename.startswith("<")]
    if not user:
        return ""
    return f" at {Path(user[-1].filename).name}:{user[-1].lineno} ({user[-1].line})"
