"""Replies to one message after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from teq_graph.errors import InputError
from teq_graph.onnx.runtime.decoder import OnnxDecoder
from teq_graph.onnx.runtime.encoder_decoder import OnnxEncoderDecoder
from teq_graph.onnx.runtime.language_model import Stream

Message = dict[str, str]


class Conversation:
    """Messages of a user and a model by its chat template; each message alone, to be continued, if `chat` is False.

    `options` are those of `OnnxDecoder.generate`. Where all messages together leave no room for a reply within the
    model's context, the oldest are left out, but not the `system` message. An encoder-decoder answers each message
    alone. Raises InputError where a template is wanted and the model has none.
    """

    def __init__(
        self,
        decoder: OnnxDecoder | OnnxEncoderDecoder,
        chat: bool,
        system: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if chat and isinstance(decoder, OnnxEncoderDecoder):
            raise InputError(f"chat: {decoder.directory} is an encoder-decoder; accepted is each message alone")
        if system is not None and not chat:
            raise InputError(f"system={system!r}: accepted where the chat template is used")
        self.decoder = decoder
        self.chat = chat
        self.options = dict(options or {})
        self.prompt_tokens = 0
        """Of the last reply."""
        self._stream: Stream[str] | None = None
        self._start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._messages: list[Message] = []

    @property
    def new_tokens(self) -> int:
        """Of the last reply."""
        return 0 if self._stream is None else len(self._stream.tokens)

    def reply(self, message: str) -> Iterator[str]:
        """The reply, piece by piece; it joins the conversation when it is complete."""
        if not self.chat:
            return self._pieces(self.decoder.encode(message), [])
        assert isinstance(self.decoder, OnnxDecoder)
        self._messages.append({"role": "user", "content": message})
        prompt = self.decoder.encode_chat([*self._start, *self._messages])
        limit = self.decoder.shape.max_positions
        while limit is not None and len(prompt) >= limit and len(self._messages) > 1:
            del self._messages[:2]
            prompt = self.decoder.encode_chat([*self._start, *self._messages])
        return self._pieces(prompt, self._messages)

    def _pieces(self, prompt: list[int], messages: list[Message]) -> Iterator[str]:
        self.prompt_tokens = len(prompt)
        self._stream = self.decoder.stream(prompt, text=True, **self.options)
        said = []
        for piece in self._stream:
            said.append(piece)
            yield piece
        messages.append({"role": "assistant", "content": "".join(said)})
