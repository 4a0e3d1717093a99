"""Chat templates come with a model and are not trusted: one without an end is ended, and the next one is rendered."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from teq_graph.errors import InputError
from teq_graph.onnx.runtime import OnnxDecoder
from teq_graph.onnx.runtime.generation import chat_template
from teq_graph.onnx.runtime.generation.chat_template import TemplateProcess

PLAIN = "{{ bos_token }}{% for m in messages %}{{ m.content }} {% endfor %}"
MESSAGES = [{"role": "user", "content": "a × b"}, {"role": "assistant", "content": "\udcff"}]
NUMBERS = "{% for i in range(99999) %}"


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template, "SECONDS", 1)
        yield TemplateProcess()


def render(process: TemplateProcess, template: str = PLAIN) -> str:
    return process.render(template, MESSAGES, {"bos_token": "<s>"})


@pytest.mark.parametrize(
    "template",
    [NUMBERS * 4 + "{% endfor %}" * 4, "{{ 10**(10**10) }}", "{% set n = 10 %}{{ 'x' if n**(n**n) else 'y' }}"],
    ids=["loops", "folded when it is compiled", "one operation"],
)
def test_a_template_without_end_is_ended(process: TemplateProcess, template: str) -> None:
    render(process)
    began = time.monotonic()
    with pytest.raises(InputError, match=r"^messages: the chat template took longer than 1 s; accepted is"):
        render(process, template)
    assert time.monotonic() - began < 5
    assert render(process) == "<s>a × b \udcff "


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ('x' * 10**9) | length }}", "more than 512 MiB"),
        ("{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}", "512 MiB"),
        ("{{ 'x' * 10**7 }}", "10000000 characters of them; accepted are up to"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ raise_exception('user first') }}", "user first"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_what_a_template_must_not_do(process: TemplateProcess, template: str, reason: str) -> None:
    with pytest.raises(InputError, match=r"^messages: the chat template refuses them: [^\n]*" + reason):
        render(process, template)
    assert render(process) == "<s>a × b \udcff "


def test_renderings_are_fast(process: TemplateProcess) -> None:
    render(process)
    began = time.monotonic()
    for _ in range(100):
        render(process)
    assert time.monotonic() - began < 2  # 0.1 s on two cores


def test_the_process_is_started_again_and_ends_with_its_owner() -> None:
    process = TemplateProcess()
    render(process)
    first = process._process
    assert first is not None
    first.kill()
    first.wait()
    assert render(process) == "<s>a × b \udcff "
    last = process._process
    del process
    assert last is not None and last.poll() == -signal.SIGKILL


def test_it_ends_by_itself_without_a_parent(process: TemplateProcess) -> None:
    """The time is its own limit, too."""
    if not hasattr(os, "wait4"):
        pytest.skip("processor time cannot be limited")
    render(process)
    running = process._process
    assert running is not None and running.stdin is not None
    running.stdin.write('{"template": "{{ 10**(10**10) }}", "messages": [], "variables": {}, "longest": 1}\n')
    running.stdin.flush()
    assert running.wait(30) == -signal.SIGXCPU


def test_it_renders_as_transformers_does(stories_dir: Path) -> None:
    decoder = OnnxDecoder.load(stories_dir, threads=1)
    decoder.tokenizer.chat_template = (
        "{{ bos_token }}{%- for m in messages %}\n  {% if loop.first %}[{% endif %}{{ m['content'] | trim | tojson }}"
        "{% if m.name is defined %}{{ m.name }}{% endif %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    messages = [{"role": "user", "content": " é\n"}, {"role": "assistant", "content": "yes"}]
    expected = decoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert decoder.encode_chat(messages) == decoder._encode(expected, add_special_tokens=False)
    assert decoder.encode_chat([{**message, "name": None} for message in messages]) == decoder.encode_chat(messages)  # type: ignore[dict-item]
