"""The tool that measures a class for each model type of transformers: a few of them, and its page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.command_line import ROOT

sys.path.append(str(ROOT / "tools"))

from covering.classes import model_classes
from covering.configurations import build, candidates
from covering.page import is_good, page


@pytest.mark.slow
def test_three_classes_and_their_page(tmp_path: Path) -> None:
    results, update = tmp_path / "results.jsonl", tmp_path / "page.md"
    only = [option for one in ("bert", "llama", "glm_ocr_vision") for option in ("--only", one)]
    command = [sys.executable, str(ROOT / "tools" / "coverage_table.py"), *("--results", str(results)), *only]
    run = subprocess.run([*command, "--update", str(update)], capture_output=True, text=True, timeout=300, check=True)
    assert "3/3" in run.stdout
    rows = {row["class"]: row for row in map(json.loads, results.read_text(encoding="utf-8").splitlines())}
    assert is_good(rows["LlamaForCausalLM"]) and rows["LlamaForCausalLM"]["cache"] is True
    assert is_good(rows["BertForMaskedLM"]) and not rows["BertForMaskedLM"]["can_generate"]
    refused = rows["GlmOcrVisionModel"]["refused"]
    assert "no inputs are made for 'hidden_states'" in refused and "\n" not in refused
    assert not any(row["printed"] for row in rows.values())
    written = update.read_text(encoding="utf-8")
    assert "captured: 2 of 3 (67%)" in written and "exact and equal in onnxruntime: 2 of 2 (100%)" in written
    # What has results is not measured again.
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "/" not in again.stdout


def test_each_model_type_has_a_class_and_each_class_one_type() -> None:
    classes = model_classes()
    assert len(classes) > 300
    assert len({one.name for one in classes}) == len({one.model_type for one in classes}) == len(classes)


def test_what_the_page_says() -> None:
    done = {"stage": "done", "captured": True, "cache": True, "can_generate": True, "weights": 3, "quantized": 2}
    none = {"cache": False, "equivalences": 0, "exact": 0.0, "onnx": 2e-7}
    rows = [
        {"class": "Good", "task": "text", **done, "equivalences": 4, "exact": 1e-7, "onnx": 2e-7, "steps": 1e-7},
        {"class": "Wrong", "task": "text", **done, "equivalences": 4, "exact": 1e-7, "onnx": 0.2, "steps": 1e-7},
        {"class": "Ahead", "task": "text", **done, **none, "looks_ahead": True},
        {"class": "Without", "task": "text", **done, **none, "looks_ahead": False},
        {"class": "Refused", "task": "text", "stage": "capture", "refused": "a reason | with a bar"},
        {"class": "Bare", "task": "text", "stage": "capture", "bare": "KeyError: 'x'"},
        {"class": "None", "task": "text", "stage": "build", "not built": "ValueError: no"},
    ]
    written = page(rows, 9)
    assert "7 of 9 classes were tried, in no order; 6 of them the tool could build." in written
    assert "exact and equal in onnxruntime: 3 of 4 (75%)" in written
    assert "an exception that is none of ours: 1 of 6 (17%)" in written
    assert "| Good | text | 2 of 3 | 4 | 1e-07 | 2e-07 | yes |" in written
    assert "with a cache: 2 of 3 (67%)" in written
    assert "| Ahead | text | 2 of 3 | 0 | 0e+00 | 2e-07 | looks ahead |" in written
    assert "a reason \\| with a bar" in written and "**not ours:** KeyError: 'x'" in written


OPEN = ["deepseek_v2", "dots1", "esm", "hunyuan_v1_dense", "lfm2_moe", "ministral", "nemotron"]
ATTENTION = ["bamba", "granitemoehybrid"]
BY_LAYER = ["gemma4_text", "neomme", "qwen2_moe", "recurrent_gemma"]
SECTIONS, WIDTHS, GROUPS = ["glm4v_text"], ["falcon_h1"], ["bailing_hybrid"]


@torch.no_grad()
@pytest.mark.parametrize("model_type", [*OPEN, *ATTENTION, *BY_LAYER, *SECTIONS, *WIDTHS, *GROUPS])
def test_a_tiny_model_of_what_a_default_leaves_open_or_says_by_layer(model_type: str) -> None:
    """None of these was built, or ran: a number was None, or settings of many layers came with two."""
    (one,) = (one for one in model_classes() if one.model_type == model_type)
    config_class = transformers.AutoConfig.for_model(model_type).__class__
    refusals = []
    for values in candidates(config_class, one.task):
        try:
            model: Any = build(getattr(transformers, one.name), config_class.from_dict(values))
            ids = torch.randint(3, 100, (2, 6))
            assert model(input_ids=ids)[0].isfinite().all()
            return
        except Exception as error:
            refusals.append(error)
    pytest.fail(str(refusals))


@torch.no_grad()
def test_some_layers_of_a_kind_leave_one_of_another() -> None:
    """All that was left of Llama 3.2 Vision's layers were those that look at images."""
    values = next(candidates(transformers.MllamaConfig, "image and text to text"))
    assert values["text_config"]["num_hidden_layers"] == 2
    assert values["text_config"]["cross_attention_layers"] == [1]
