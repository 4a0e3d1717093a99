"""The loop of decoding: prompts through the session, then token after token, with the KV cache between the steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime import OrtValue

from teq_graph.capture.shapes import PAST, PRESENT
from teq_graph.errors import InputError, one_line
from teq_graph.onnx.directory import LOGITS_FROM, Metadata
from teq_graph.onnx.runtime import tensors
from teq_graph.onnx.runtime.generation.prompt_lookup import guess
from teq_graph.onnx.runtime.generation.sampling import Sampler
from teq_graph.onnx.runtime.generation.text import StoppedText
from teq_graph.system import memory

IntArray = npt.NDArray[np.int64]

# Longer prompts are prefilled in parts, which bounds the memory of activations and attention scores. A processor was
# measured to be as fast with parts of 128 as of 512; a GPU, not measured, has more to do at once with the larger.
PREFILL_TOKENS = {"cpu": 128, "cuda": 512}

_DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}


def never() -> bool:
    """What is never cancelled."""
    return False


@dataclasses.dataclass
class Continuation:
    """A prompt and what follows it.

    `finish_reason` is None while it goes on and where it was cancelled, "stop" after an end token or a stop string, and
    "length" where it was as long as it may be. `text`, where asked for, turns tokens into pieces.
    """

    prompt: list[int]
    eos_tokens: frozenset[int]
    text: StoppedText | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    def push(self, token: int) -> str | None:
        """Append `token`; returns the text that is certain now, None where the sequence ended before the token."""
        if token in self.eos_tokens:
            self.finish_reason = "stop"
            return None
        self.tokens.append(token)
        piece = "" if self.text is None else self.text.push(token)
        if self.text is not None and self.text.stopped:
            self.finish_reason = "stop"
        return piece


@dataclasses.dataclass
class Cache:
    """The cached tensors of each layer, in turn, what binds them to the session, and what it fills with logits."""

    values: list[OrtValue]
    binding: onnxruntime.IOBinding
    logits: npt.NDArray[Any]
    logits_from: OrtValue | None = None
    best_only: bool = False
    """Whether of a step's logits the largest is all that is asked for."""


class DecoderSession:
    """An onnxruntime session with a decoder's inputs and outputs."""

    def __init__(self, session: onnxruntime.InferenceSession, metadata: Metadata) -> None:
        assert metadata.decoder is not None
        self.session = session
        self.metadata = metadata
        self.shape = metadata.decoder
        self._dtype = metadata.dtype
        provider = session.get_providers()[0]
        self.device = _DEVICES.get(provider, "cpu")
        self.device_id = int(session.get_provider_options().get(provider, {}).get("device_id", 0))
        names = {item.name for item in session.get_inputs()}
        self._chooses_logits, self._takes_mask = LOGITS_FROM in names, "attention_mask" in names

    def logits(self, ids: IntArray, mask: IntArray) -> npt.NDArray[np.float32]:
        """Logits float32 [b, s, vocab] of whole sequences."""
        logits: npt.NDArray[np.float32] = self._step(ids, mask, self._new_cache(*ids.shape), ids.shape[1])
        return logits

    def decode(
        self,
        rows: Sequence[Continuation],
        count: int,
        sampler: Sampler,
        lookup: int = 0,
        cancelled: Callable[[], bool] = never,
    ) -> Iterator[tuple[int, int, str]]:
        """(row, token, text) as they are generated, `count` tokens for each row at most.

        `cancelled` is asked before each step, also before each part of a prompt, and ends them all.

        A sequence by itself is given up to `lookup` guessed tokens with its newest one. They stay as far as they are
        what the sampler chooses then; what the others leave in a shared cache is written over.
        """
        length = max(len(row.prompt) for row in rows)
        # Left padding: the last position of every row is its newest token.
        padding = np.array([length - len(row.prompt) for row in rows])
        fresh = np.full((len(rows), length), self.metadata.pad_token_id or 0, dtype=np.int64)
        for index, row in enumerate(rows):
            fresh[index, padding[index] :] = row.prompt
        if not count:
            for row in rows:
                row.finish_reason = "length"
            return
        cache = self._new_cache(len(rows), length + count)
        cache.best_only = sampler.takes_best
        # Attention as one operator, which shares buffers where there are no states beside it, takes several new tokens
        # after a past for one sequence only.
        whole = len(rows) > 1 and (self.metadata.shared_buffers or self.shape.states)
        prefill = length if whole else PREFILL_TOKENS[self.device]
        switch = self.shape.recompute_after
        if switch is not None and length > switch:
            prefill = length
        # The newest token and its guesses are one part, whose logits are all needed.
        guesses = self.metadata.shared_buffers and len(rows) == 1 and switch is None
        lookup = min(lookup, prefill - 1) if guesses else 0
        guessed: list[int] = []
        seen, left = 0, count
        tokens_seen = fresh[:, :0]
        while left:
            if switch is not None:
                if 0 < seen <= switch < seen + fresh.shape[1]:
                    fresh, seen = np.concatenate([tokens_seen, fresh], axis=1), 0
                    prefill = fresh.shape[1]
                    best_only, cache = cache.best_only, self._new_cache(len(rows), length + count)
                    cache.best_only = best_only
                tokens_seen = fresh if seen == 0 else np.concatenate([tokens_seen, fresh], axis=1)
            for start in range(0, fresh.shape[1], prefill):
                if cancelled():
                    return
                part = fresh[:, start : start + prefill]
                mask = np.arange(seen + start + part.shape[1]) >= padding[:, None]
                logits = self._step(part, mask.astype(np.int64), cache, 1 + len(guessed))
            for accepted, ahead in enumerate([*guessed, None]):
                before = [(row.prompt, row.tokens) for row in rows]
                tokens = self._choose(sampler, logits, accepted - 1 - len(guessed), before)
                left -= 1
                for index, row in enumerate(rows):
                    if row.finish_reason is not None:
                        continue
                    token = int(tokens[index])
                    piece = row.push(token)
                    if not left and row.finish_reason is None:
                        row.finish_reason = "length"
                    if piece is not None:
                        yield index, token, piece
                if all(row.finish_reason is not None for row in rows):
                    return
                if tokens[0] != ahead:
                    break
            seen += fresh.shape[1] - len(guessed) + accepted
            guessed = guess([*rows[0].prompt, *rows[0].tokens], min(lookup, left - 1)) if lookup else []
            fresh = np.array([[tokens[0], *guessed]]) if guessed else tokens[:, None]

    def _choose(
        self, sampler: Sampler, logits: Any, position: int, before: Sequence[tuple[list[int], list[int]]]
    ) -> IntArray:
        """The tokens [b] after `position` of what a step gave."""
        return sampler(logits[:, position], before)

    def _step(self, ids: IntArray, mask: IntArray, cache: Cache, last: int) -> Any:
        """Logits [b, s, vocab], until the next step; the cache, which stays on the session's device, holds the new
        tokens afterwards.

        Only of the `last` positions, where the graph has a choice.
        """
        try:
            binding = cache.binding
            binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
            if self._takes_mask:
                binding.bind_cpu_input("attention_mask", np.ascontiguousarray(mask))
            rows, positions = ids.shape
            if self._chooses_logits:
                positions = min(positions, last)
            if cache.logits.shape[:2] != (rows, positions):
                self._bind_logits(cache, rows, positions)
            if not self.metadata.shared_buffers:
                for name, value in zip(self._cache_names(PAST), cache.values, strict=True):
                    binding.bind_ortvalue_input(name, value)
                for name in self._cache_names(PRESENT):
                    binding.bind_output(name, self.device, self.device_id)
            self.session.run_with_iobinding(binding)
            if not self.metadata.shared_buffers:
                cache.values = binding.get_outputs()[1:]
        except MemoryError:
            raise
        except Exception as error:  # onnxruntime has a dozen exception types, with no base of their own
            raise InputError(f"onnxruntime refuses input_ids {list(ids.shape)}: {one_line(error)}") from error
        return tensors.as_float32(cache.logits)

    def _bind_logits(self, cache: Cache, rows: int, positions: int) -> None:
        # onnxruntime uses the memory of both, and does not keep it alive.
        cache.logits = np.empty((rows, positions, self.shape.vocab_size), tensors.array_type(self._dtype))
        cache.binding.bind_ortvalue_output("logits", tensors.as_value(cache.logits, self._dtype))
        if self._chooses_logits:
            cache.logits_from = OrtValue.ortvalue_from_numpy(np.array([-positions]))
            cache.binding.bind_ortvalue_input(LOGITS_FROM, cache.logits_from)

    def _cache_names(self, prefix: str) -> list[str]:
        return [f"{prefix}.{name}" for name in self.shape.cache_names]

    def _new_cache(self, batch: int, positions: int) -> Cache:
        """A cache of `positions` where past and present share buffers, otherwise a past of no tokens.

        Raises InputError where it could not become so long.
        """
        self._check_room(batch, positions)
        values = self._new_values(batch, positions if self.metadata.shared_buffers else 0)
        cache = Cache(values, self.session.io_binding(), np.empty((0, 0)))
        if self.metadata.shared_buffers:
            # Once for all steps: binding a hundred names anew takes a fifth of a small model's step.
            for prefix, bind in (
                (PAST, cache.binding.bind_ortvalue_input),
                (PRESENT, cache.binding.bind_ortvalue_output),
            ):
                for name, value in zip(self._cache_names(prefix), values, strict=True):
                    bind(name, value)
        return cache

    def _new_values(self, batch: int, length: int) -> list[OrtValue]:
        """The cached tensors of each layer, in turn, all zero."""
        values = []
        for tensor in self.shape.cached:
            zeros = np.zeros(tensor.shape(batch, length), tensors.array_type(self._dtype))
            values.append(tensors.as_value(zeros, self._dtype, self.device, self.device_id))
        return values

    def _check_room(self, batch: int, positions: int) -> None:
        """Refuse a cache for which there is no memory.

        Before it is made: the system gives out zeros that it does not have, and ends the process once they are used.
        """
        # Unless they are one, past and present are there at the same time.
        copies = 1 if self.metadata.shared_buffers else 2
        width = batch * copies * tensors.array_type(self._dtype).itemsize
        states = width * self.shape.cached_numbers(0)
        each = width * self.shape.cached_numbers(1) - states
        available = memory.available_bytes()
        if available is not None and states + positions * each > available:
            fits = max(0, available - states) // each if each else 0
            raise InputError(
                f"cache of {positions} positions, prompt and new tokens together: {states + positions * each:,} bytes; "
                f"accepted are up to {fits} positions, in the {available:,} bytes of memory that are available"
            )
