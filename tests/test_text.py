"""Text as its tokens arrive: whole characters, and strings that end it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from teq_graph.onnx.runtime.generation.text import StoppedText, TextStream


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


def test_text_waits_for_whole_characters() -> None:
    stream = TextStream(Bytes(), list(b"before "))
    pieces = [stream.push(byte) for byte in "aé€🙂b".encode()]
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "🙂", "b"]
    assert stream.push("é".encode()[0]) == ""
    assert stream.finish() == "�"
    assert stream.finish() == ""


def test_text_of_random_characters() -> None:
    generator = np.random.default_rng(torch.randint(0, 2**31, ()).item())
    text = "".join(chr(code) for code in generator.integers(32, 0x2FFF, 200) if chr(code).isprintable())
    stream = TextStream(Bytes())
    assert "".join(stream.push(byte) for byte in text.encode()) + stream.finish() == text


def test_stop_strings_across_pieces() -> None:
    text = "one two three, two"
    for stops, expected in ((("two",), "one "), (("ee,", "three"), "one two "), (("four",), text), (("o", "e tw"), "")):
        stopped = StoppedText(TextStream(Bytes()), stops)
        pieces = [stopped.push(byte) for byte in text.encode()]
        assert "".join(pieces) + stopped.finish() == expected
        assert stopped.stopped == (expected != text)
    waiting = StoppedText(TextStream(Bytes()), ["abc"])
    assert [waiting.push(byte) for byte in b"xababd"] == ["x", "", "", "ab", "", "abd"]
