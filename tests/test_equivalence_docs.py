"""`docs/equivalences.md`: its table is what `RULES` holds, and every op there has a proof."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

from markdown_table import replace_section
from rules_table import rules, table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "equivalences.md"


def proofs() -> dict[str, str]:
    """Name of each rule -> the text under its heading."""
    sections = re.split(r"^#+ (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {title: text.strip() for title, text in zip(sections[1::2], sections[2::2], strict=True)}


def test_the_table_is_the_present_rules(tmp_path: Path) -> None:
    written = tmp_path / PAGE.name
    written.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    replace_section(written, "rules", table())
    assert written.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8"), (
        "python tools/rules_table.py --update docs/equivalences.md"
    )


@pytest.mark.parametrize("rule", rules())
def test_every_op_has_a_proof(rule: str) -> None:
    proof = proofs()[rule]
    named = set(re.findall(r"`([\w.]+)`", proof))
    missing = [op for op in rules()[rule] if op.partition(".")[0] not in named]
    assert not missing and len(proof.split()) >= 15


def test_no_proof_is_of_a_rule_that_is_gone() -> None:
    page = PAGE.read_text(encoding="utf-8")
    below = page.partition("## Proofs")[2].partition("\n## ")[0]
    assert re.findall(r"^### (.*)$", below, flags=re.MULTILINE) == list(rules())
