"""What exported models that write text have in common: their tokenizer, options, and how a sequence becomes text."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import onnxruntime

from teq_graph.errors import InputError, ModelFileError, one_line
from teq_graph.onnx.directory import GENERATION_FILE, Metadata
from teq_graph.onnx.runtime import arguments
from teq_graph.onnx.runtime.generation import chat_template
from teq_graph.onnx.runtime.generation.decoding import Continuation, DecoderSession
from teq_graph.onnx.runtime.generation.options import NEUTRAL, GenerationOptions, is_neutral
from teq_graph.onnx.runtime.generation.sampling import Sampler
from teq_graph.onnx.runtime.generation.text import StoppedText, TextStream
from teq_graph.system.files import read_json

T = TypeVar("T")
CHAT_TEMPLATE_FILE = "chat_template.jinja"  # as transformers names it


class Stream(Iterator[T], Generic[T]):
    """Pieces of one sequence, each as soon as it is there.

    `tokens` are those that were generated so far, and `finish_reason` says, once the pieces are at an end, what ended
    them: "stop" (an end token, a stop string), "length", or None where it was cancelled.
    """

    def __init__(self, continuation: Continuation, pieces: Iterator[T]) -> None:
        self._continuation = continuation
        self._pieces = pieces

    def __next__(self) -> T:
        return next(self._pieces)

    @property
    def tokens(self) -> list[int]:
        return self._continuation.tokens

    @property
    def finish_reason(self) -> str | None:
        return self._continuation.finish_reason


class LanguageModel:
    """An exported model that writes text, with its tokenizer where one was exported."""

    def __init__(self, session: onnxruntime.InferenceSession, metadata: Metadata, directory: Path) -> None:
        assert metadata.decoder is not None
        self.session = session
        self.metadata = metadata
        self.directory = directory
        self.shape = metadata.decoder

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The exported Hugging Face tokenizer; raises ModelFileError where the directory has none."""
        # Without its files, transformers would make up an empty tokenizer from the config.
        if not (self.directory / "tokenizer_config.json").is_file():
            raise ModelFileError(f"{self.directory} has no usable tokenizer: its files are missing")
        if (self.directory / CHAT_TEMPLATE_FILE).is_file():
            chat_template.shared().start()  # meanwhile
        from teq_graph.loading import load_tokenizer

        return load_tokenizer(str(self.directory), str(self.directory), local_files_only=True)

    @functools.cached_property
    def generation_options(self) -> GenerationOptions:
        """What the exported `generation_config.json` sets; raises ModelFileError where it is damaged."""
        path = self.directory / GENERATION_FILE
        if not path.is_file():
            return GenerationOptions()
        try:
            content = read_json(path)
            names = {field.name for field in dataclasses.fields(GenerationOptions)} - {"eos_token_id"}
            given = {name: content[name] for name in names if content.get(name) is not None}
            options = GenerationOptions(**given)
            ignored = [name for name in NEUTRAL if not is_neutral(name, content.get(name))]
        except (OSError, ValueError, AttributeError, InputError) as error:
            raise ModelFileError(f"{path} cannot be read: {one_line(error)}") from None
        if ignored:
            asked = ", ".join(f"{name}={content[name]!r}" for name in ignored)
            message = f"{path}: {asked} is not implemented and has no effect; accepted is {NEUTRAL[ignored[0]]}"
            warnings.warn(message, stacklevel=2)
        return options

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that the tokenizer puts around it."""
        return self._encode(text)

    def decode(self, tokens: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text that `tokens` add to the tokens `after` which they come."""
        old, new = arguments.tokens("after", after), arguments.tokens("tokens", tokens)
        if old or new:
            self._check_tokens(np.array([old + new], dtype=object))
        stream = TextStream(self.tokenizer, old)
        return "".join([*map(stream.push, new), stream.finish()])

    # ---------------------------------------------------------------------------------------------------- pieces

    def _options(self, max_new_tokens: int | None, config: Any, options: dict[str, Any]) -> GenerationOptions:
        chosen = self.generation_options
        if config is not None:
            chosen = chosen.with_config(config)
        if max_new_tokens is not None:
            options = {**options, "max_new_tokens": max_new_tokens}
        return chosen.changed(**options)

    def _continuation(self, prompt: list[int], options: GenerationOptions, text: bool) -> Continuation:
        stops = self.metadata.eos_token_ids if options.eos_token_id is None else options.eos_token_id
        if not text and not options.stop_strings:
            return Continuation(prompt, frozenset(stops))
        stream = TextStream(self.tokenizer, prompt)
        return Continuation(prompt, frozenset(stops), StoppedText(stream, options.stop_strings))

    def _decode(
        self,
        session: DecoderSession,
        rows: list[Continuation],
        options: GenerationOptions,
        cancelled: Callable[[], bool],
    ) -> Iterator[tuple[int, int, str]]:
        """What the rows become; checks the arguments before the first token is asked for."""
        for row in rows:
            if not row.prompt:
                raise InputError("prompt: it is empty; accepted is at least one token")
            self._check_tokens(np.array([row.prompt], dtype=object))  # whatever their size
        for name, tokens in options.tokens().items():
            wrong = [token for token in tokens if not 0 <= token < self.shape.vocab_size]
            if wrong:
                raise InputError(f"{name}: token {wrong[0]}; accepted are 0 to {self.shape.vocab_size - 1}")
        length = max(len(row.prompt) for row in rows)
        count = options.new_tokens(length)
        if self.shape.max_positions is not None:
            # The last position that fits still gives one token.
            count = min(count, self.shape.max_positions - length + 1)
        sampler = Sampler(options, sorted(rows[0].eos_tokens), count)
        return session.decode(rows, count, sampler, options.prompt_lookup_num_tokens or 0, cancelled)

    def _written(
        self,
        rows: list[Continuation],
        steps: Iterator[tuple[int, int, str]],
        as_text: bool,
        callback: Callable[[int, int], None] | None,
    ) -> list[Any]:
        """Of each row what was written; `callback` is told each token."""
        pieces: list[list[str]] = [[] for _ in rows]
        for index, token, piece in steps:
            pieces[index].append(piece)
            if callback is not None:
                callback(index, token)
        return [
            "".join([*parts, row.text.finish()]) if as_text and row.text is not None else row.tokens
            for row, parts in zip(rows, pieces, strict=True)
        ]

    def _encode(self, text: str, **options: Any) -> list[int]:
        return [int(token) for token in self.tokenizer(arguments.text("prompt", text), **options)["input_ids"]]

    def _prompts(self, prompt: Any) -> tuple[list[list[int]], bool, bool]:
        """Token ids of each prompt; whether it is a single one; whether it is text."""
        if isinstance(prompt, str):
            return [self.encode(prompt)], True, True
        if isinstance(prompt, (list, tuple)) and prompt and all(isinstance(item, str) for item in prompt):
            return [self.encode(item) for item in prompt], False, True
        rows, batch = arguments.token_rows(prompt)
        return rows, not batch, False

    def _check_tokens(self, ids: npt.NDArray[Any]) -> None:
        if ids.ndim != 2 or ids.size == 0:
            raise InputError(f"tokens of shape {list(ids.shape)}: accepted is at least one token per sequence")
        if ids.min() < 0 or ids.max() >= self.shape.vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise InputError(f"token {wrong}: accepted are 0 to {self.shape.vocab_size - 1}")
        limit = self.shape.max_positions
        if limit is not None and ids.shape[1] > limit:
            raise InputError(f"prompt of {ids.shape[1]} tokens: accepted are up to the model's context of {limit}")


def as_stream(row: Continuation, steps: Iterator[tuple[int, int, str]], text: bool) -> Stream[Any]:
    """Strings of whole characters if `text`, otherwise tokens."""
    if not text:
        return Stream(row, (token for _, token, _ in steps))
    assert row.text is not None
    return Stream(row, _pieces(steps, row.text))


def _pieces(steps: Iterator[tuple[int, int, str]], text: StoppedText) -> Iterator[str]:
    for _, _, piece in steps:
        if piece:
            yield piece
    if rest := text.finish():
        yield rest
