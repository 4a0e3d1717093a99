"""Tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# A character takes at most 4 bytes, so at most 4 tokens; the rest is context for leading spaces.
_CONTEXT_TOKENS = 8
_INCOMPLETE = "\ufffd"


class TextStream:
    """Text of a growing sequence of tokens.

    A token can hold part of a character, and whether a token starts with a space can depend on the one before
    it. So text is the difference of two decodings that start at the same earlier token, and waits for whole
    characters. The pieces joined are what the tokens add to the prompt's text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = [int(token) for token in prompt[-_CONTEXT_TOKENS:]]
        self._start = 0
        self._shown = len(self._tokens)

    def push(self, token: int) -> str:
        """Append `token`; returns the text that is complete now, which may be empty."""
        self._tokens.append(int(token))
        return self._advance(final=False)

    def finish(self) -> str:
        """The rest, characters that never became whole included."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._decode(self._tokens[self._start : self._shown])
        after = self._decode(self._tokens[self._start :])
        if len(after) <= len(before) or (after.endswith(_INCOMPLETE) and not final):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return after[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StoppedText:
    """Text of a growing sequence of tokens, up to the first of some strings.

    Text that may be the beginning of such a string waits until it is known to be another one.
    """

    def __init__(self, stream: TextStream, stop_strings: Sequence[str]) -> None:
        self._stream = stream
        self._stop_strings = stop_strings
        self._waiting = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Append `token`; returns the text that is certain now, which may be empty."""
        return self._advance(self._stream.push(token))

    def finish(self) -> str:
        """The rest, up to a stop string."""
        rest = self._advance(self._stream.finish())
        waiting, self._waiting = self._waiting, ""
        return rest + waiting

    def _advance(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._waiting + piece
        found = [text.index(stop) for stop in self._stop_strings if stop in text]
        if found:
            self.stopped, self._waiting = True, ""
            return text[: min(found)]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._waiting = text[certain:]
        return text[:certain]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
