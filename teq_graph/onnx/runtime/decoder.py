"""An exported causal language model: text generation with a KV cache."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnxruntime

from teq_graph.errors import InputError, ModelFileError, one_line
from teq_graph.onnx.directory import Metadata
from teq_graph.onnx.runtime import arguments, on_device
from teq_graph.onnx.runtime.encoder_decoder import OnnxEncoderDecoder
from teq_graph.onnx.runtime.generation import chat_template
from teq_graph.onnx.runtime.generation.decoding import DecoderSession, never
from teq_graph.onnx.runtime.generation.device_decoding import DeviceSession
from teq_graph.onnx.runtime.language_model import LanguageModel, Stream, as_stream
from teq_graph.onnx.runtime.model import OnnxModel
from teq_graph.onnx.runtime.session import CPU, Provider, open_directory, open_encoder

Prompt = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]] | npt.NDArray[Any]


def load(
    directory: str | os.PathLike[str],
    providers: Sequence[Provider] = CPU,
    threads: int | None = None,
    session_options: onnxruntime.SessionOptions | None = None,
    verify: bool = True,
) -> OnnxDecoder | OnnxEncoderDecoder | OnnxModel:
    """Open an exported directory as what it holds; arguments and errors as for `OnnxDecoder.load`."""
    session, metadata = open_directory(directory, providers, threads, session_options, verify)
    if metadata.decoder is None:
        return OnnxModel(session, metadata)
    if metadata.encoder is not None:
        encoder = open_encoder(directory, metadata.encoder, providers, threads, session_options)
        return OnnxEncoderDecoder(encoder, session, metadata, Path(directory))
    return OnnxDecoder(session, metadata, Path(directory))


class OnnxDecoder(LanguageModel):
    """An exported causal language model, with its tokenizer where one was exported."""

    def __init__(self, session: onnxruntime.InferenceSession, metadata: Metadata, directory: Path) -> None:
        if metadata.decoder is None or metadata.encoder is not None:
            what = "" if metadata.encoder is None else " but an encoder-decoder"
            accepted = "accepted is one that generates text from what it is to continue"
            raise ModelFileError(f"{directory}: it is not a causal language model{what}; {accepted}")
        super().__init__(session, metadata, directory)

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
        steps = self._decode(self._decoding, rows, chosen, cancelled)
        results = self._written(rows, steps, text, callback)
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
        return as_stream(row, self._decode(self._decoding, [row], chosen, cancelled), text)

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

    # ---------------------------------------------------------------------------------------------------- pieces

    @functools.cached_property
    def _decoding(self) -> DecoderSession:
        kind = DeviceSession if on_device.takes_lengths(self.session) else DecoderSession
        return kind(self.session, self.metadata)
