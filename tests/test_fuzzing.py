"""The fuzzer of files and the killer of runs: that they see what is wrong, and a few inputs and kills of each."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import ROOT, start

sys.path.append(str(ROOT / "tools"))

from fuzzing.mutations import MUTATIONS, damage

WAYS_TO_END = """
import os, sys, tempfile, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from fuzz_files import end_of
from fuzzing.processes import Process

def bomb():
    Path("executed").touch()
    raise ValueError

def grow():
    return len(bytes(2**40))

ends = {
    "refused": lambda: {"refusal": "x=3: accepted is 2"},
    "long refusal": lambda: {"refusal": "one line" + chr(10) + "another"},
    "loaded": lambda: {"finite": True},
    "not finite": lambda: {"finite": False},
    "noise": lambda: print("a warning") or {"finite": True},
    "raw exception": grow,
    "crash": lambda: os.abort(),
    "hang": lambda: time.sleep(60),
    "executed": bomb,
}
for expected, function in ends.items():
    folder = Path(tempfile.mkdtemp(dir=sys.argv[2]))
    outcome = Process(function, folder, timeout=2).wait()
    end, said = end_of(outcome, folder)
    assert end == expected, (end, expected, said)
"""


def test_every_end_is_seen(tmp_path: Path) -> None:
    process = start(WAYS_TO_END, ROOT / "tools", tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def test_the_same_seed_damages_in_the_same_way(tmp_path: Path) -> None:
    sound = tmp_path / "sound"
    sound.mkdir()
    (sound / "config.json").write_text('{"layers": [{"heads": 3}], "name": "x"}')
    (sound / "weights.bin").write_bytes(bytes(range(256)))
    done = []
    for copy in ("first", "second"):
        for seed in range(60):
            target = shutil.copytree(sound, tmp_path / copy / str(seed))
            done.append(damage(random.Random(seed), target))
    assert done[:60] == done[60:]
    assert len(set(done)) > 2 * len(MUTATIONS)


@pytest.mark.slow
def test_thirty_damaged_inputs(data_dir: Path) -> None:
    model = data_dir / "models" / "stories260K"
    command = [sys.executable, ROOT / "tools" / "fuzz_files.py", "--inputs", "30", "--model", model]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_three_kills(data_dir: Path) -> None:
    model = data_dir / "models" / "stories260K"
    command = [sys.executable, ROOT / "tools" / "kill_runs.py", "--kills", "3", "--only", "save", "--model", model]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| save")]
    assert [row[2] for row in rows] == ["2", "1"], result.stdout + result.stderr
    assert [row[7] for row in rows] == ["0", "0"], result.stdout  # half-written
