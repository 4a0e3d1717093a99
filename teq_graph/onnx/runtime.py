"""Running exported directories with onnxruntime: text generation with a KV cache, and other models."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime import OrtValue

from teq_graph.errors import InputError, ModelFileError
from teq_graph.files import one_line
from teq_graph.onnx import arguments
from teq_graph.onnx.directory import Metadata
from teq_graph.onnx.sampling import Sampler
from teq_graph.onnx.session import CPU, Provider, open_directory
from teq_graph.onnx.text import TextStream

IntArray = npt.NDArray[np.int64]
Prompt = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]] | npt.NDArray[Any]

# Longer prompts are prefilled in parts, which bounds the memory of their logits and attention scores.
PREFILL_TOKENS = 512

_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
}
_DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}


def load(
    directory: str | os.PathLike[str],
    providers: Sequence[Provider] = CPU,
    threads: int | None = None,
    session_options: onnxruntime.SessionOptions | None = None,
) -> OnnxDecoder | OnnxModel:
    """Open an exported directory as what it holds; arguments and errors as for `OnnxDecoder.load`."""
    session, metadata = open_directory(directory, providers, threads, session_options)
    if metadata.decoder is None:
        return OnnxModel(session, metadata)
    return OnnxDecoder(session, metadata, Path(directory))


class OnnxModel:
    """An exported model that is no decoder."""

    def __init__(self, session: onnxruntime.InferenceSession, metadata: Metadata) -> None:
        self.session = session
        self.metadata = metadata

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        providers: Sequence[Provider] = CPU,
        threads: int | None = None,
        session_options: onnxruntime.SessionOptions | None = None,
    ) -> Self:
        """Open an exported directory; arguments and errors as for `OnnxDecoder.load`."""
        return cls(*open_directory(directory, providers, threads, session_options))

    def run(self, **inputs: Any) -> dict[str, npt.NDArray[Any]]:
        """The model's outputs by name. Inputs are arrays or what numpy makes arrays of, cast to the model's types.

        Raises InputError for missing or unknown names, and for shapes that the model does not take.
        """
        expected = {item.name: item.type for item in self.session.get_inputs()}
        if set(inputs) != set(expected):
            raise InputError(f"inputs {sorted(inputs)}: accepted are {sorted(expected)}")
        feeds = {name: _as_array(name, value, _NUMPY_TYPES[expected[name]]) for name, value in inputs.items()}
        try:
            outputs = self.session.run(None, feeds)
        except Exception as error:  # onnxruntime has a dozen exception types, with no base of their own
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items())
            raise InputError(f"onnxruntime refuses {shapes}: {one_line(error)}") from error
        return {item.name: cast(Any, value) for item, value in zip(self.session.get_outputs(), outputs, strict=True)}


def _as_array(name: str, value: Any, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{array.dtype} of shape {list(array.shape)}")
        # A float where the model takes integers would be cut off.
        return array.astype(dtype, casting="same_kind" if array.dtype.kind == "f" else "unsafe")
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: accepted are values of {np.dtype(dtype)}, not {one_line(error)}") from error


@dataclasses.dataclass
class _Cache:
    """Keys and values of each layer, in turn, and what binds them to the session."""

    values: list[OrtValue]
    binding: onnxruntime.IOBinding


class OnnxDecoder:
    """An exported causal language model, with its tokenizer where one was exported."""

    def __init__(self, session: onnxruntime.InferenceSession, metadata: Metadata, directory: Path) -> None:
        if metadata.decoder is None:
            raise ModelFileError(f"{directory}: it is not a causal language model; accepted is one that generates text")
        self.session = session
        self.metadata = metadata
        self.directory = directory
        self.shape = metadata.decoder
        self._dtype = np.dtype(metadata.dtype)
        provider = session.get_providers()[0]
        self._device = _DEVICES.get(provider, "cpu")
        self._device_id = int(session.get_provider_options().get(provider, {}).get("device_id", 0))
        self._tokenizer: Any = None

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        providers: Sequence[Provider] = CPU,
        threads: int | None = None,
        session_options: onnxruntime.SessionOptions | None = None,
    ) -> Self:
        """Open an exported directory.

        `providers` are onnxruntime's, most wanted first, each a name or (name, options). `threads` is the number
        of CPU threads of one operator, None leaves it to onnxruntime. Raises InputError for a provider that this
        onnxruntime does not have, ModelFileError for a directory that is none or damaged.
        """
        session, metadata = open_directory(directory, providers, threads, session_options)
        return cls(session, metadata, Path(directory))

    @property
    def tokenizer(self) -> Any:
        """The exported Hugging Face tokenizer; raises ModelFileError where the directory has none."""
        if self._tokenizer is None:
            # Without its files, transformers would make up an empty tokenizer from the config.
            if not (self.directory / "tokenizer_config.json").is_file():
                raise ModelFileError(f"{self.directory} has no usable tokenizer: its files are missing")
            from teq_graph.loading import load_tokenizer

            self._tokenizer = load_tokenizer(str(self.directory), str(self.directory), local_files_only=True)
        return self._tokenizer

    def logits(self, input_ids: Any, attention_mask: Any = None) -> npt.NDArray[np.float32]:
        """Logits float32 [b, s, vocab] of whole sequences int [b, s]; mask [b, s], 0 where there is padding."""
        ids = arguments.integers("input_ids", input_ids)
        mask = np.ones_like(ids) if attention_mask is None else arguments.integers("attention_mask", attention_mask)
        self._check_tokens(ids)
        if mask.shape != ids.shape:
            raise InputError(f"attention_mask {list(mask.shape)}: accepted is input_ids' shape, {list(ids.shape)}")
        return self._step(ids, mask, self._new_cache(*ids.shape)).astype(np.float32)

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_tokens: Sequence[int] | None = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> Any:
        """Continue a prompt, or a batch of prompts at once.

        A string gives a string, token ids give a list of ids, a list of either gives a list of results; prompts
        of a batch may differ in length. Sampling as in `Sampler`. A sequence ends before one of `stop_tokens`
        (None: the model's own), after `max_new_tokens`, or where the context is full. `callback(row, token)` is
        told each new token. Raises InputError for an empty prompt, one longer than the context, tokens outside
        the vocabulary, and arguments of another type; NumericsError where the model's logits are not finite.
        """
        prompts, single, text = self._prompts(prompt)
        sampler = Sampler(temperature, top_k, top_p, seed)
        results: list[list[int]] = [[] for _ in prompts]
        for row, token in self._tokens(prompts, max_new_tokens, sampler, stop_tokens):
            results[row].append(token)
            if callback is not None:
                callback(row, token)
        outputs: list[Any] = list(results)
        if text:
            outputs = [self.decode(new, after=old) for old, new in zip(prompts, results, strict=True)]
        return outputs[0] if single else outputs

    def stream(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_tokens: Sequence[int] | None = None,
        text: bool | None = None,
    ) -> Iterator[Any]:
        """Continue one prompt, giving each piece as soon as it is there; arguments and errors as for `generate`.

        Pieces are strings of whole characters if `text` (None: if the prompt is a string), otherwise token ids.
        """
        prompts, single, from_text = self._prompts(prompt)
        if not single:
            raise InputError(f"prompt: a batch of {len(prompts)}; accepted by stream is a single one")
        sampler = Sampler(temperature, top_k, top_p, seed)
        tokens = (token for _, token in self._tokens(prompts, max_new_tokens, sampler, stop_tokens))
        return self._pieces(prompts[0], tokens) if (from_text if text is None else text) else tokens

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that the tokenizer puts around it."""
        return self._encode(text)

    def encode_chat(self, messages: str | Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation (a string: one message of the user), up to where the reply begins.

        Raises InputError where the tokenizer has no chat template, or the template does not take the messages.
        """
        if not self.tokenizer.chat_template:
            raise InputError(f"{self.directory}: its tokenizer has no chat template; accepted are plain prompts")
        conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        try:
            rendered = self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # what the template itself raises, and jinja2 where it meets another type
            raise InputError(f"messages: the chat template refuses them: {one_line(error)}") from error
        return self._encode(rendered, add_special_tokens=False)

    def decode(self, tokens: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text that `tokens` add to the tokens `after` which they come."""
        old, new = arguments.tokens("after", after), arguments.tokens("tokens", tokens)
        if old or new:
            self._check_tokens(np.array([old + new], dtype=object))
        return "".join(self._pieces(old, new))

    def _encode(self, text: str, **options: Any) -> list[int]:
        return [int(token) for token in self.tokenizer(arguments.text("prompt", text), **options)["input_ids"]]

    def _pieces(self, prompt: Sequence[int], tokens: Any) -> Iterator[str]:
        stream = TextStream(self.tokenizer, prompt)
        for token in tokens:
            if piece := stream.push(token):
                yield piece
        if piece := stream.finish():
            yield piece

    def _prompts(self, prompt: Prompt) -> tuple[list[list[int]], bool, bool]:
        """Token ids of each prompt; whether it is a single one; whether it is text."""
        if isinstance(prompt, str):
            return [self.encode(prompt)], True, True
        if isinstance(prompt, (list, tuple)) and prompt and all(isinstance(item, str) for item in prompt):
            return [self.encode(item) for item in prompt], False, True
        rows, batch = arguments.token_rows(prompt)
        return rows, not batch, False

    def _tokens(
        self, prompts: list[list[int]], max_new_tokens: int, sampler: Sampler, stop_tokens: Sequence[int] | None
    ) -> Iterator[tuple[int, int]]:
        """(row, token) as they are generated; checks the arguments before the first is asked for."""
        max_new_tokens = arguments.integer("max_new_tokens", max_new_tokens, 0)
        for row in prompts:
            self._check_tokens(np.array([row], dtype=object))  # whatever their size
        stops = set(
            self.metadata.eos_token_ids if stop_tokens is None else arguments.tokens("stop_tokens", stop_tokens)
        )
        length = max(map(len, prompts))
        if self.shape.max_positions is not None:
            # The last position that fits still gives one token.
            max_new_tokens = min(max_new_tokens, self.shape.max_positions - length + 1)
        # Left padding: the last position of every row is its newest token.
        ids = np.full((len(prompts), length), self.metadata.pad_token_id or 0, dtype=np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(prompts):
            ids[index, length - len(row) :] = row
            mask[index, length - len(row) :] = 1
        return self._generate(ids, mask, max_new_tokens, sampler, stops)

    def _generate(
        self, ids: IntArray, mask: IntArray, count: int, sampler: Sampler, stops: set[int]
    ) -> Iterator[tuple[int, int]]:
        cache = self._new_cache(len(ids), ids.shape[1] + count)
        # The operator that shares buffers takes several new tokens after a past for one sequence only.
        prefill = ids.shape[1] if self.metadata.shared_buffers and len(ids) > 1 else PREFILL_TOKENS
        running = np.ones(len(ids), dtype=bool)
        fresh = ids
        for index in range(count):
            seen = mask.shape[1] - fresh.shape[1]
            for start in range(0, fresh.shape[1], prefill):
                part = fresh[:, start : start + prefill]
                logits = self._step(part, mask[:, : seen + start + part.shape[1]], cache)
            tokens = sampler(logits[:, -1].astype(np.float32))
            for row in np.flatnonzero(running):
                if int(tokens[row]) in stops:
                    running[row] = False
                else:
                    yield int(row), int(tokens[row])
            if not running.any() or index == count - 1:
                return
            fresh = tokens[:, None]
            mask = np.concatenate([mask, np.ones_like(fresh)], axis=1)

    def _step(self, ids: IntArray, mask: IntArray, cache: _Cache) -> npt.NDArray[Any]:
        """Logits [b, s, vocab]; the cache, which stays on the session's device, holds the new tokens afterwards."""
        try:
            binding = cache.binding
            binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
            binding.bind_cpu_input("attention_mask", np.ascontiguousarray(mask))
            # onnxruntime writes into this array, and does not keep it alive.
            logits = np.empty((*ids.shape, self.shape.vocab_size), self._dtype)
            binding.bind_ortvalue_output("logits", OrtValue.ortvalue_from_numpy(logits))
            if not self.metadata.shared_buffers:
                for name, value in zip(self._cache_names("past_key_values"), cache.values, strict=True):
                    binding.bind_ortvalue_input(name, value)
                for name in self._cache_names("present"):
                    binding.bind_output(name, self._device, self._device_id)
            self.session.run_with_iobinding(binding)
            if not self.metadata.shared_buffers:
                cache.values = binding.get_outputs()[1:]
        except Exception as error:  # onnxruntime has a dozen exception types, with no base of their own
            raise InputError(f"onnxruntime refuses input_ids {list(ids.shape)}: {one_line(error)}") from error
        return logits

    def _cache_names(self, prefix: str) -> list[str]:
        return [f"{prefix}.{index}.{kind}" for index in range(len(self.shape.layers)) for kind in ("key", "value")]

    def _new_cache(self, batch: int, positions: int) -> _Cache:
        """Buffers for `positions` tokens where past and present share them, otherwise a past of no tokens."""
        values, length = [], positions if self.metadata.shared_buffers else 0
        for c in self.shape.layers:
            for heads, dim in ((c.key_heads, c.key_dim), (c.value_heads, c.value_dim)):
                zeros = np.zeros((batch, heads, length, dim), dtype=self._dtype)
                values.append(OrtValue.ortvalue_from_numpy(zeros, self._device, self._device_id))
        cache = _Cache(values, self.session.io_binding())
        if self.metadata.shared_buffers:
            # Once for all steps: binding a hundred names anew takes a fifth of a small model's step.
            for prefix, bind in (
                ("past_key_values", cache.binding.bind_ortvalue_input),
                ("present", cache.binding.bind_ortvalue_output),
            ):
                for name, value in zip(self._cache_names(prefix), values, strict=True):
                    bind(name, value)
        return cache

    def _check_tokens(self, ids: npt.NDArray[Any]) -> None:
        if ids.ndim != 2 or ids.size == 0:
            raise InputError(f"tokens of shape {list(ids.shape)}: accepted is at least one token per sequence")
        if ids.min() < 0 or ids.max() >= self.shape.vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise InputError(f"token {wrong}: accepted are 0 to {self.shape.vocab_size - 1}")
        limit = self.shape.max_positions
        if limit is not None and ids.shape[1] > limit:
            raise InputError(f"prompt of {ids.shape[1]} tokens: accepted are up to the model's context of {limit}")


__all__ = ["OnnxDecoder", "OnnxModel", "Sampler", "load"]
