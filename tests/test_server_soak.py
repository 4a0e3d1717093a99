"""The tool that sends many requests to a server, some of them hostile or abandoned: a few of them."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import soak_server


def test_a_short_soak(stories_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(stories_dir, tmp_path / "stories")
    (tmp_path / "stories" / "chat_template.jinja").write_text(soak_server.CHAT, encoding="utf-8")
    result = soak_server.soak(tmp_path / "stories", 60, 4, seed=3)
    assert {status for (kind, status) in result.answers if kind == "usual"} == {"200"}
    assert {status for (kind, status) in result.answers if kind == "hostile"} <= {
        *("closed", "200", "400", "401", "403", "404", "413", "415"),
    }
    assert {kind for kind, _ in result.answers} == {"usual", "hostile", "abandoned"}
    assert (result.answers.total(), result.stuck, result.errors) == (60, 0, "")
    assert result.exit_code == 128 + signal.SIGTERM
    assert result.answered_seconds < 5
