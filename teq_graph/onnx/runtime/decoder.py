"""An exported causal language model: text generation with a KV cache."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt
import onnxruntime

from teq_graph.errors import InputError, ModelFileError, one_line
from teq_graph.onnx.directory import GENERATION_FILE, Metadata
from teq_graph.onnx.runtime import arguments, on_device
from teq_graph.onnx.runtime.generation import chat_template
from teq_graph.onnx.runtime.generation.decoding import Continuation, DecoderSession, never
from teq_graph.onnx.runtime.generation.device_decoding import DeviceSession
from teq_graph.onnx.runtime.generation.options import NEUTRAL, GenerationOptions, is_neutral
from teq_graph.onnx.runtime.generation.sampling import Sampler
from teq_graph.onnx.runtime.generation.text import StoppedText, TextStream
from teq_graph.onnx.runtime.model import OnnxModel
from teq_graph.onnx.runtime.session import CPU, Provider, open_directory
from teq_graph.system.files import read_json

T = TypeVar("T")
CHAT_TEMPLATE_FILE = "chat_template.jinja"  # as transformers names it
Prompt = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]] | npt.NDArray[Any]


def load(
    directory: str | os.PathLike[str],
    providers: Sequence[Provider] = CPU,
    threads: int | None = None,
    session_options: onnxruntime.SessionOptions | None = None,
    verify: bool = True,
) -> OnnxDecoder | OnnxModel:
    """Open an exported directory as what it holds; arguments and errors as for `OnnxDecoder.load`."""
    session, metadata = open_directory(directory, providers, threads, session_options, verify)
    if metadata.decoder is None:
        return OnnxModel(session, metadata)
    return OnnxDecoder(session, metadata, Path(directory))


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


class OnnxDecoder:
    """An exported causal language model, with its tokenizer where one was exported."""

    def __init__(self, session: onnxruntime.InferenceSession, metadata: Metadata, directory: Path) -> None:
        if metadata.decoder is None:
            raise ModelFileError(f"{directory}: it is not a causal language model; accepted is one that generates text")
        self.session = session
        self.metadata = metadata
        self.directory = directory
        self.shape = metadata.decoder

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        providers: Sequence[Provider] = CPU,
        threads: int | None = None,
        session_options: onnxruntime.SessionOptions | None = None,
        verify: bool = True,
    ) -> Self:
        """Open an exported directory.

        `providers` are onnxruntime's, most wanted first, each a name or (name, options). `threads` is the number
        of CPU threads of one operator, None leaves it to onnxruntime. `verify`: compare the checksums of model and
        weights. Raises InputError for a provider that this onnxruntime does not have, ModelFileError for a directory
        that is none or damaged.
        """
        session, metadata = open_directory(directory, providers, threads, session_options, verify)
        return cls(session, metadata, Path(directory))

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

    def logits(self, input_ids: Any, attention_mask: Any = None) -> npt.NDArray[np.float32]:
        """Logits float32 [b, s, vocab] of whole sequences int [b, s]; mask [b, s], 0 where there is padding."""
        ids = arguments.integers("input_ids", input_ids)
        mask = np.ones_like(ids) if attention_mask is None else arguments.integers("attention_mask", attention_mask)
        self._check_tokens(ids)
        if mask.shape != ids.shape:
            raise InputError(f"attention_mask {list(mask.shape)}: accepted is input_ids' shape, {list(ids.shape)}")
        return self._decoding.logits(ids, mask)

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        generation_config: Any = None,
        callback: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] = never,
        **options: Any,
    ) -> Any:
        """Continue a prompt, or a batch of prompts at once.

        A string gives a string, token ids give a list of ids, a list of either gives a list of results; prompts
        of a batch may differ in length. Options are those of `GenerationOptions`, of transformers' names and meanings:
        what is given here goes before `generation_config` (transformers' object, or a mapping), and that before what
        was exported. A sequence ends before an end token or a stop string (of a result in tokens, with the token that
        completes it), after `max_new_tokens`, or where the context is full. `callback(row, token)` is told each new
        token. `cancelled()` is asked before every step of the model, also between the parts of a long prompt; where
        it is true, the results are what there is by then. Raises InputError for an empty prompt, one longer than the
        context, tokens outside the vocabulary, a cache that the memory does not hold, and arguments of another type;
        NumericsError where the model's logits are not finite.
        """
        prompts, single, text = self._prompts(prompt)
        chosen = self._options(max_new_tokens, generation_config, options)
        rows = [self._continuation(row, chosen, text) for row in prompts]
        pieces: list[list[str]] = [[] for _ in rows]
        for index, token, piece in self._decode(rows, chosen, cancelled):
            pieces[index].append(piece)
            if callback is not None:
                callback(index, token)
        results: list[Any] = [row.tokens for row in rows]
        if text:
            rest = [row.text.finish() for row in rows if row.text is not None]
            results = ["".join([*parts, end]) for parts, end in zip(pieces, rest, strict=True)]
        return results[0] if single else results

    def stream(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int | None = None,
        generation_config: Any = None,
        text: bool | None = None,
        cancelled: Callable[[], bool] = never,
        **options: Any,
    ) -> Stream[Any]:
        """Continue one prompt, giving each piece as soon as it is there; arguments and errors as for `generate`.

        Pieces are strings of whole characters if `text` (None: if the prompt is a string), otherwise token ids.
        """
        prompts, single, from_text = self._prompts(prompt)
        if not single:
            raise InputError(f"prompt: a batch of {len(prompts)}; accepted by stream is a single one")
        chosen = self._options(max_new_tokens, generation_config, options)
        text = from_text if text is None else text
        row = self._continuation(prompts[0], chosen, text)
        steps = self._decode([row], chosen, cancelled)
        if not text:
            return Stream(row, (token for _, token, _ in steps))
        assert row.text is not None
        return Stream(row, _pieces(steps, row.text))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that the tokenizer puts around it."""
        return self._encode(text)

    def encode_chat(self, messages: str | Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation (a string: one message of the user), up to where the reply begins.

        Raises InputError where the tokenizer has no chat template, or the template does not take the messages, or does
        not end within `chat_template.SECONDS` and `chat_template.MEMORY`.
        """
        if not self.tokenizer.chat_template:
            raise InputError(f"{self.directory}: its tokenizer has no chat template; accepted are plain prompts")
        conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        try:
            # As transformers has it: what is None is not there.
            plain = [{name: value for name, value in message.items() if value is not None} for message in conversation]
            template = self.tokenizer.get_chat_template()
            rendered = chat_template.shared().render(template, plain, self.tokenizer.special_tokens_map)
        except InputError:
            raise
        except Exception as error:  # what is no list of messages, or cannot be said in JSON
            raise InputError(f"messages: the chat template refuses them: {one_line(error)}") from error
        return self._encode(rendered, add_special_tokens=False)

    def decode(self, tokens: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text that `tokens` add to the tokens `after` which they come."""
        old, new = arguments.tokens("after", after), arguments.tokens("tokens", tokens)
        if old or new:
            self._check_tokens(np.array([old + new], dtype=object))
        stream = TextStream(self.tokenizer, old)
        return "".join([*map(stream.push, new), stream.finish()])

    # ---------------------------------------------------------------------------------------------------- pieces

    @functools.cached_property
    def _decoding(self) -> DecoderSession:
        kind = DeviceSession if on_device.takes_lengths(self.session) else DecoderSession
        return kind(self.session, self.metadata)

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
        self, rows: list[Continuation], options: GenerationOptions, cancelled: Callable[[], bool]
    ) -> Iterator[tuple[int, int, str]]:
        """What the rows become; checks the arguments before the first token is asked for."""
        for row in rows:
            if not row.prompt:
                raise InputError("prompt: it is empty; accepted is at least one token")
            self._check_tokens(np.array([row.prompt], dtype=object))  # whatever their size
        for name in ("suppress_tokens", "eos_token_id"):
            wrong = [token for token in getattr(options, name) or () if not 0 <= token < self.shape.vocab_size]
            if wrong:
                raise InputError(f"{name}: token {wrong[0]}; accepted are 0 to {self.shape.vocab_size - 1}")
        length = max(len(row.prompt) for row in rows)
        count = options.new_tokens(length)
        if self.shape.max_positions is not None:
            # The last position that fits still gives one token.
            count = min(count, self.shape.max_positions - length + 1)
        sampler = Sampler(options, sorted(rows[0].eos_tokens))
        return self._decoding.decode(rows, count, sampler, options.prompt_lookup_num_tokens or 0, cancelled)

    def _encode(self, text: str, **options: Any) -> list[int]:
        return [int(token) for token in self.tokenizer(arguments.text("prompt", text), **options)["input_ids"]]

    def _prompts(self, prompt: Prompt) -> tuple[list[list[int]], bool, bool]:
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


def _pieces(steps: Iterator[tuple[int, int, str]], text: StoppedText) -> Iterator[str]:
    for _, _, piece in steps:
        if piece:
            yield piece
    if rest := text.finish():
        yield rest
