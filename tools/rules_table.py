"""The table of `docs/equivalences.md`: the ops that channels pass through, as `RULES` has them.

python tools/rules_table.py --update docs/equivalences.md
"""

from __future__ import annotations

import argparse
import inspect
import operator
from pathlib import Path
from typing import Any

from markdown_table import replace_section

from teq_graph.analysis.equivalences.rules import RULES

HEADER = "| rule | ops | what it does |\n|---|---|---|"


def rules() -> dict[str, list[str]]:
    """Name of each rule -> the ops it is for, in the order of `RULES`."""
    ops: dict[str, list[str]] = {}
    for op, rule in RULES.items():
        ops.setdefault(rule.__name__.strip("_"), []).append(name_of(op))
    return ops


def name_of(op: Any) -> str:
    """`movedim.int`, without the overload where it is the default one."""
    return "getitem" if op is operator.getitem else str(op).partition(".")[2].removesuffix(".default")


def table() -> str:
    """One row a rule, from its docstring."""
    says = {rule.__name__.strip("_"): inspect.getdoc(rule) or "" for rule in RULES.values()}
    lines = [HEADER]
    for rule, ops in rules().items():
        first = " ".join(says[rule].split("\n\n")[0].split())
        lines.append(f"| [{rule}](#{rule}) | {', '.join(f'`{op}`' for op in ops)} | {first} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", type=Path, help="Markdown file whose section «rules» takes the table")
    arguments = parser.parse_args()
    print(table())
    if arguments.update:
        replace_section(arguments.update, "rules", table())


if __name__ == "__main__":
    main()
