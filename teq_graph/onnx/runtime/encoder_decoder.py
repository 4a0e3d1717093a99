"""An exported encoder-decoder: what it reads is encoded once, and text is written with KV caches."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime import OrtValue

from teq_graph.capture.shapes import ENCODED, MASK, PAST, PRESENT, EncoderShape
from teq_graph.errors import InputError, ModelFileError, one_line
from teq_graph.onnx.directory import Metadata
from teq_graph.onnx.runtime import arguments, speech, tensors
from teq_graph.onnx.runtime.generation.decoding import Cache, Continuation, DecoderSession, never
from teq_graph.onnx.runtime.generation.options import GenerationOptions
from teq_graph.onnx.runtime.language_model import LanguageModel, Stream, as_stream
from teq_graph.onnx.runtime.session import CPU, Provider, open_directory, open_encoder

IDS = "input_ids"


class EncodedSession(DecoderSession):
    """A decoder's session over one encoded batch, whose tensors are inputs of every step.

    Its prompts are of one length: the graph has no mask for them.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, metadata: Metadata, encoded: Mapping[str, OrtValue]
    ) -> None:
        super().__init__(session, metadata)
        self._encoded = encoded

    def _new_cache(self, batch: int, positions: int) -> Cache:
        cache = super()._new_cache(batch, positions)
        for name, value in self._encoded.items():
            cache.binding.bind_ortvalue_input(name, value)
        return cache


class OnnxEncoderDecoder(LanguageModel):
    """An exported encoder-decoder, with its tokenizer where one was exported."""

    def __init__(
        self,
        encoder: onnxruntime.InferenceSession,
        session: onnxruntime.InferenceSession,
        metadata: Metadata,
        directory: Path,
    ) -> None:
        super().__init__(session, metadata, directory)
        self.encoder = encoder
        self.encoder_shape = _encoder_of(metadata, directory)
        self._read = {item.name for item in session.get_inputs() if item.name.startswith(ENCODED)}

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        providers: Sequence[Provider] = CPU,
        threads: int | None = None,
        session_options: onnxruntime.SessionOptions | None = None,
        verify: bool = True,
    ) -> Self:
        """Open an exported directory; arguments and errors as for `OnnxDecoder.load`."""
        session, metadata = open_directory(directory, providers, threads, session_options, verify)
        encoder = open_encoder(directory, _encoder_of(metadata, directory), providers, threads, session_options)
        return cls(encoder, session, metadata, Path(directory))

    def generate(
        self,
        source: Any,
        max_new_tokens: int | None = None,
        generation_config: Any = None,
        callback: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] = never,
        decoder_input_ids: Sequence[int] | None = None,
        text: bool | None = None,
        **options: Any,
    ) -> Any:
        """What the model writes of a source, or of each of a batch.

        `source`: text or token ids, as for `OnnxDecoder.generate`; where the encoder takes other things, as features of
        sound, an array of them, with an axis for the batch or without. `decoder_input_ids`: the tokens that each result
        goes on from, None: the model's start token. Results are without them; strings if `text` (None: if the source
        is), otherwise token ids. Options and errors are those of `OnnxDecoder.generate`.
        """
        chosen = self._options(max_new_tokens, generation_config, options)
        inputs, single, is_text = self._inputs(source)
        text = is_text if text is None else text
        rows = self._rows(len(next(iter(inputs.values()))), decoder_input_ids, chosen, text)
        steps = self._decode(self._encode_inputs(inputs), rows, chosen, cancelled)
        results = self._written(rows, steps, text, callback)
        return results[0] if single else results

    def stream(
        self,
        source: Any,
        max_new_tokens: int | None = None,
        generation_config: Any = None,
        text: bool | None = None,
        cancelled: Callable[[], bool] = never,
        decoder_input_ids: Sequence[int] | None = None,
        **options: Any,
    ) -> Stream[Any]:
        """What the model writes of one source, each piece as soon as it is there; arguments as for `generate`."""
        inputs, single, is_text = self._inputs(source)
        if not single:
            raise InputError("source: a batch; accepted by stream is a single one")
        chosen = self._options(max_new_tokens, generation_config, options)
        text = is_text if text is None else text
        (row,) = self._rows(1, decoder_input_ids, chosen, text)
        return as_stream(row, self._decode(self._encode_inputs(inputs), [row], chosen, cancelled), text)

    def transcribe(
        self,
        recording: speech.Recording,
        language: str | None = None,
        task: str | None = None,
        cancelled: Callable[[], bool] = never,
        **options: Any,
    ) -> Stream[str]:
        """What the model writes of a recording, as `speech.read_wave` gives it, piece by piece.

        `language` (as "en") and `task` ("transcribe", "translate") are those that the generation config names tokens
        for, as Whisper's does. None: the language that the model hears, and to transcribe. Other arguments as for
        `generate`. Raises InputError for a recording that the model's feature extractor does not take.
        """
        name = self.encoder_shape.inputs[0]
        inputs, _, _ = self._inputs(speech.features(self.feature_extractor, recording, name))
        chosen = self._options(None, None, options)
        session, start = self._encode_inputs(inputs), self._start(None)

        def likeliest(tokens: Sequence[int]) -> int:
            self._check_tokens(np.array([tokens]))
            logits = session.logits(np.array([start]), np.ones((1, len(start)), np.int64))
            return tokens[int(logits[0, -1, tokens].argmax())]

        begun = speech.TranscriptTokens.read(self.directory).begin(start[0], likeliest, language, task)
        (row,) = self._rows(1, begun, chosen, True)
        return as_stream(row, self._decode(session, [row], chosen, cancelled), True)

    def encode(self, text: str) -> list[int]:
        """Token ids of a source, with the special tokens that the tokenizer puts around it; refuses an empty one."""
        if text == "":
            raise InputError("source: an empty text; accepted is one of at least one character")
        return super().encode(text)

    @property
    def hears(self) -> bool:
        """Whether sources are features, as of sounds, and not text."""
        return IDS not in self.encoder_shape.inputs

    @functools.cached_property
    def feature_extractor(self) -> Any:
        """What was exported to make features of sounds.

        Raises InputError where the model takes text, ModelFileError where the directory has none.
        """
        from teq_graph.loading import EXTRACTOR_FILE, load_feature_extractor

        if not self.hears:
            raise InputError(f"{self.directory}: it takes text, and no recording")
        if not (self.directory / EXTRACTOR_FILE).is_file():
            raise ModelFileError(f"{self.directory / EXTRACTOR_FILE} is missing: it tells how sounds become features")
        return load_feature_extractor(str(self.directory), str(self.directory), local_files_only=True)

    def logits(self, source: Any, decoder_input_ids: Any) -> npt.NDArray[np.float32]:
        """Logits float32 [b, s, vocab] of the tokens int [b, s] that are written of a batch of sources."""
        ids = arguments.integers("decoder_input_ids", decoder_input_ids)
        self._check_tokens(ids)
        inputs, _, _ = self._inputs(source)
        if len(ids) != (rows := len(next(iter(inputs.values())))):
            raise InputError(f"decoder_input_ids {list(ids.shape)}: accepted are {rows} rows, as there are sources")
        return self._encode_inputs(inputs).logits(ids, np.ones_like(ids))

    # ---------------------------------------------------------------------------------------------------- pieces

    def _inputs(self, source: Any) -> tuple[dict[str, npt.NDArray[Any]], bool, bool]:
        """The encoder's inputs for a batch; whether it is a single source; whether it is text."""
        if self.hears:
            return *self._features(source), False
        rows, single, is_text = self._prompts(source)
        for row in rows:
            self._check_source(row)
        length = max(map(len, rows))
        mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        ids = np.full(mask.shape, self.metadata.pad_token_id or 0)
        ids[mask == 1] = np.concatenate(rows)
        if MASK not in self.encoder_shape.inputs and not mask.all():
            raise InputError("source: a batch of different lengths; accepted is one length, as the model takes no mask")
        inputs = {IDS: ids, MASK: mask}
        return {name: inputs[name] for name in self.encoder_shape.inputs}, single, is_text

    def _check_source(self, row: Sequence[int]) -> None:
        shape = self.encoder_shape
        if not row:
            raise InputError("source: it is empty; accepted is at least one token")
        if shape.vocab_size is not None and not 0 <= min(row) <= max(row) < shape.vocab_size:
            wrong = min(row) if min(row) < 0 else max(row)
            raise InputError(f"source: token {wrong}; accepted are 0 to {shape.vocab_size - 1}")
        if shape.max_positions is not None and len(row) > shape.max_positions:
            raise InputError(f"source of {len(row)} tokens: accepted are up to {shape.max_positions}")

    def _features(self, source: Any) -> tuple[dict[str, npt.NDArray[Any]], bool]:
        (item,) = self.encoder.get_inputs()
        sizes = item.shape
        accepted = f"numbers [{', '.join(map(str, sizes))}], or of one source without the first axis"
        try:
            array = np.asarray(source, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(f"source: {one_line(error)}; accepted are {accepted}") from error
        single = array.ndim == len(sizes) - 1
        array = array[None] if single else array
        fits = array.ndim == len(sizes) and all(
            not isinstance(size, int) or size == given for size, given in zip(sizes, array.shape, strict=True)
        )
        if not fits or not array.size:
            raise InputError(f"source {list(array.shape)}: accepted are {accepted}")
        return {item.name: array}, single

    def _rows(
        self, count: int, decoder_input_ids: Sequence[int] | None, options: GenerationOptions, text: bool
    ) -> list[Continuation]:
        """A continuation for each source."""
        prompt = self._start(decoder_input_ids)
        return [self._continuation(prompt, options, text) for _ in range(count)]

    def _start(self, decoder_input_ids: Sequence[int] | None) -> list[int]:
        """The tokens given, or the model's start token."""
        start = self.metadata.decoder_start_token_id
        if decoder_input_ids is None and start is None:
            raise InputError("decoder_input_ids=None: the model names no token to start with; accepted are token ids")
        return arguments.tokens("decoder_input_ids", [start] if decoder_input_ids is None else decoder_input_ids)

    def _encode_inputs(self, inputs: Mapping[str, npt.NDArray[Any]]) -> EncodedSession:
        """A session of the decoder over what the encoder makes of `inputs`."""
        decoding = DecoderSession(self.session, self.metadata)
        try:
            given = {name: self._value(array) for name, array in inputs.items()}
            binding = self.encoder.io_binding()
            for name, value in given.items():
                binding.bind_ortvalue_input(name, value)
            for name in self.encoder_shape.cache_names:
                binding.bind_output(f"{PRESENT}.{name}", decoding.device, decoding.device_id)
            self.encoder.run_with_iobinding(binding)
            values = binding.get_outputs()
        except MemoryError:
            raise
        except Exception as error:  # onnxruntime has a dozen exception types, with no base of their own
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in inputs.items())
            raise InputError(f"onnxruntime refuses {shapes}: {one_line(error)}") from error
        encoded = {f"{PAST}.{name}": value for name, value in zip(self.encoder_shape.cache_names, values, strict=True)}
        encoded |= {f"{ENCODED}{name}": value for name, value in given.items() if f"{ENCODED}{name}" in self._read}
        return EncodedSession(self.session, self.metadata, encoded)

    def _value(self, array: npt.NDArray[Any]) -> OrtValue:
        if array.dtype.kind == "f":
            return tensors.as_value(tensors.of_float32(array, self.metadata.dtype), self.metadata.dtype)
        return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, dtype=np.int64))


def _encoder_of(metadata: Metadata, directory: str | os.PathLike[str]) -> EncoderShape:
    if metadata.encoder is None:
        raise ModelFileError(f"{directory}: it is no encoder-decoder; accepted is one with an encoder")
    return metadata.encoder
