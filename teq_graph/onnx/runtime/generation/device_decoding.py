"""Decoding where the graph takes lengths: no padding, steps over buffers that stay, and tokens found on the device."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime import OrtValue

from teq_graph.capture.shapes import PAST, PRESENT
from teq_graph.errors import InputError, one_line
from teq_graph.onnx.directory import LOGITS_FROM, Metadata
from teq_graph.onnx.padding import LAST_POSITIONS, TOTAL_LENGTH
from teq_graph.onnx.runtime import on_device, tensors
from teq_graph.onnx.runtime.generation.decoding import Cache, DecoderSession, IntArray
from teq_graph.onnx.runtime.generation.sampling import Sampler

FloatArray = npt.NDArray[np.float32]

MIN_CAPACITY = 256
"""Positions of the smallest cache that is kept; larger ones double, so that most of a process's share few graphs."""

_GRAPHS = itertools.count(1)
"""Names of graphs; no two of a process are the same, whichever object asks the session for them."""


@dataclasses.dataclass
class Best:
    """The token of the largest logit of each row, and that logit, both [b]: what there is of a step's logits."""

    tokens: IntArray
    logits: FloatArray


@dataclasses.dataclass(eq=False)
class Step:
    """What a step of one token each reads and writes, at addresses that stay, and the graph that it is captured as."""

    binding: onnxruntime.IOBinding
    tokens: OrtValue
    last_positions: OrtValue
    logits: OrtValue
    best: tuple[OrtValue, OrtValue] | None
    held: tuple[OrtValue, ...]
    options: onnxruntime.RunOptions | None


@dataclasses.dataclass(eq=False)
class Buffers:
    """Keys and values [b, h, capacity, d] of each layer in turn, and the step over them once there was one."""

    values: list[OrtValue]
    capacity: int
    step: Step | None = None


@dataclasses.dataclass(eq=False)
class DeviceCache(Cache):
    """Buffers, as long as one sequence or batch of them goes on."""

    buffers: Buffers = dataclasses.field(kw_only=True)


class DeviceSession(DecoderSession):
    """A session of `on_device.open_on_device`."""

    def __init__(self, session: onnxruntime.InferenceSession, metadata: Metadata) -> None:
        super().__init__(session, metadata)
        self._captures = on_device.captures(session)
        self._finds_best = any(item.name == on_device.BEST_TOKEN for item in session.get_outputs())
        self._free: dict[tuple[int, int], Buffers] = {}

    def _new_cache(self, batch: int, positions: int) -> Cache:
        capacity = self._capacity(positions)
        buffers = self._free.pop((batch, capacity), None)
        if buffers is None:
            buffers = Buffers(self._new_values(batch, capacity), capacity)
        cache = DeviceCache(buffers.values, self._bind(buffers.values), np.empty((0, 0)), buffers=buffers)
        if self._captures:
            # Kept for the next sequence, since the graph is bound to these addresses.
            kept = weakref.finalize(cache, self._free.__setitem__, (batch, capacity), buffers)
            kept.atexit = False
        return cache

    def _step(self, ids: IntArray, mask: IntArray, cache: Cache, last: int) -> Any:
        assert isinstance(cache, DeviceCache)
        new = ids.shape[1]
        real = mask[:, mask.shape[1] - new :] != 0
        seen = mask[:, : mask.shape[1] - new].sum(axis=1)
        try:
            if new == 1 and real.all():
                return self._decode_one(ids, seen, cache)
            if real.all() and (seen == seen[0]).all():
                return self._run(cache.binding, ids, seen, last)
            return self._run_by_row(ids, real, seen, cache, last)
        except Exception as error:  # onnxruntime has a dozen exception types, with no base of their own
            raise InputError(f"onnxruntime refuses input_ids {list(ids.shape)}: {one_line(error)}") from error

    def _choose(
        self, sampler: Sampler, logits: Any, position: int, before: Sequence[tuple[list[int], list[int]]]
    ) -> IntArray:
        if isinstance(logits, Best):
            sampler.check(logits.logits)
            return logits.tokens
        return super()._choose(sampler, logits, position, before)

    # ---------------------------------------------------------------------------------------------------- pieces

    def _decode_one(self, ids: IntArray, seen: IntArray, cache: DeviceCache) -> FloatArray | Best:
        buffers = cache.buffers
        if buffers.step is None:
            buffers.step = self._new_step(len(ids), buffers)
        step = buffers.step
        step.tokens.update_inplace(np.ascontiguousarray(ids))
        step.last_positions.update_inplace(seen.astype(np.int32))
        self.session.run_with_iobinding(step.binding, step.options)
        if cache.best_only and step.best is not None:
            token, logit = (value.numpy()[:, 0] for value in step.best)
            return Best(token, logit)
        logits: FloatArray = step.logits.numpy()
        return logits

    def _run(self, binding: onnxruntime.IOBinding, ids: IntArray, seen: IntArray, last: int) -> FloatArray:
        """Logits [b, s or last, vocab] of as many new tokens in each row, after as many that were seen."""
        rows, new = ids.shape
        positions = min(new, last) if self._chooses_logits else new
        logits = np.empty((rows, positions, self.shape.vocab_size), np.float32)
        # onnxruntime uses the memory of these, and does not keep it alive.
        held = {
            LAST_POSITIONS: (seen + new - 1).astype(np.int32),
            TOTAL_LENGTH: (seen[:1] + new).astype(np.int32),
            LOGITS_FROM: np.array([-positions]),
            "input_ids": np.ascontiguousarray(ids),
        }
        for name, array in held.items():
            if name != LOGITS_FROM or self._chooses_logits:
                binding.bind_cpu_input(name, array)
        binding.bind_ortvalue_output("logits", OrtValue.ortvalue_from_numpy(logits))
        self.session.run_with_iobinding(binding, on_device.run_options(None) if self._captures else None)
        return logits

    def _run_by_row(
        self, ids: IntArray, real: npt.NDArray[np.bool_], seen: IntArray, cache: DeviceCache, last: int
    ) -> FloatArray:
        """As `_run`, where rows differ: each by itself, without its padding, whose logits are 0."""
        rows, new = ids.shape
        logits = np.zeros((rows, new, self.shape.vocab_size), np.float32)
        for row in range(rows):
            if real[row].any():
                places = np.flatnonzero(real[row])
                binding = self._bind(cache.values, row)
                found = self._run(binding, ids[row : row + 1, places], seen[row : row + 1], last)
                logits[row, places[len(places) - found.shape[1] :]] = found[0]
        return logits[:, new - min(new, last) :] if self._chooses_logits else logits

    def _new_step(self, rows: int, buffers: Buffers) -> Step:
        binding = self._bind(buffers.values)
        tokens = self._empty([rows, 1], np.int64)
        last_positions = self._empty([rows], np.int32)
        # Read by the processor, and while a step is captured only: as long as any step may be.
        total = OrtValue.ortvalue_from_numpy(np.array([buffers.capacity], np.int32))
        logits = self._empty([rows, 1, self.shape.vocab_size], np.float32)
        held = [total]
        binding.bind_ortvalue_input("input_ids", tokens)
        binding.bind_ortvalue_input(LAST_POSITIONS, last_positions)
        binding.bind_ortvalue_input(TOTAL_LENGTH, total)
        if self._chooses_logits:
            held.append(OrtValue.ortvalue_from_numpy(np.array([-1])))
            binding.bind_ortvalue_input(LOGITS_FROM, held[-1])
        binding.bind_ortvalue_output("logits", logits)
        best = None
        if self._finds_best:
            best = self._empty([rows, 1], np.int64), self._empty([rows, 1], np.float32)
            for name, value in zip((on_device.BEST_TOKEN, on_device.BEST_LOGIT), best, strict=True):
                binding.bind_ortvalue_output(name, value)
        options = on_device.run_options(next(_GRAPHS)) if self._captures else None
        return Step(binding, tokens, last_positions, logits, best, tuple(held), options)

    def _bind(self, values: Sequence[OrtValue], row: int | None = None) -> onnxruntime.IOBinding:
        """A binding of past and present to these buffers, or to one row of each."""
        binding = self.session.io_binding()
        for prefix, bind in ((PAST, binding.bind_input), (PRESENT, binding.bind_output)):
            for name, value in zip(self._cache_names(prefix), values, strict=True):
                batch, *size = value.shape()
                start = 0 if row is None else row * int(np.prod(size)) * tensors.array_type(self._dtype).itemsize
                shape = [batch if row is None else 1, *size]
                kind = tensors.element_type(self._dtype)
                bind(name, self.device, self.device_id, kind, shape, value.data_ptr() + start)
        return binding

    def _empty(self, shape: list[int], dtype: Any) -> OrtValue:
        value: OrtValue = OrtValue.ortvalue_from_shape_and_type(shape, dtype, self.device, self.device_id)
        return value

    def _capacity(self, positions: int) -> int:
        if not self._captures:
            return positions
        capacity = max(MIN_CAPACITY, 1 << (positions - 1).bit_length())
        longest = self.shape.max_positions
        return capacity if longest is None else max(positions, min(capacity, longest))


def try_step(session: onnxruntime.InferenceSession, metadata: Metadata) -> None:
    """Run a step as decoding does; raises InputError where onnxruntime refuses it."""
    decoding = DeviceSession(session, metadata)
    decoding._step(np.array([[0]]), np.ones((1, 2), np.int64), decoding._new_cache(1, 2), 1)
