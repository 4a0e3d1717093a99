"""Tasks of lm-evaluation-harness: a language model as the harness sees one, and a run that prints nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from teq_graph.errors import ConfigError, InputError, NumericsError, one_line
from teq_graph.system import progress

if TYPE_CHECKING:
    from teq_graph.evaluation.text import LogitsFn

try:
    import lm_eval
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.models.utils import (
        DEFAULT_MAX_LENGTH,
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.tasks import TaskManager
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("needs the package lm-eval; pip install teq-graph[tasks]", name=error.name) from error

_MAX_NEW_TOKENS = 256  # where a task names no number, as the harness's own models have it
_RESAMPLES = 1000  # for a standard error without a formula, such as a perplexity's


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """One metric of one task over `samples` documents; `stderr` None: the harness has none for this metric."""

    task: str
    metric: str
    value: float
    stderr: float | None
    num_fewshot: int
    samples: int


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """A language model for `lm_eval.evaluate` and `lm_eval.simple_evaluate`, whatever computes its logits.

    `logits_fn`: `input_ids [b, s] int64 -> logits [b, s, vocab]`, causal. `max_length`: positions of the model; what
    is longer loses tokens on the left, as in the harness's `hf` model. Text becomes tokens as there, too. Generation
    is greedy, and computes the whole sequence for every token.
    """

    def __init__(self, logits_fn: LogitsFn, tokenizer: Any, max_length: int | None = None, batch_size: int = 8) -> None:
        super().__init__()
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if first is None:
            raise InputError("tokenizer: it has no token that begins or ends a text; tasks need one before the text")
        self.tokenizer = tokenizer
        self.max_length = max_length or DEFAULT_MAX_LENGTH
        self.batch_size = batch_size
        self._logits_fn = logits_fn
        self._prefix_token = int(first)
        self._prefix_text: str = tokenizer.decode([first])

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text that has no context."""
        return self._prefix_token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; None: with the tokenizer's special tokens, unless the text begins with them."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._prefix_text)
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)
        return ids

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Of each continuation after its context: the log-likelihood, and whether it is the most likely one."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of each whole text, in windows of `max_length` that predict every token once."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            for window in utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """The most likely continuation of each context, up to the first of its stop strings."""
        rows = [self._row(*request.args) for request in requests]
        with progress.task("Generating", len(rows)) as work:
            for batch in self._batches([len(row.tokens) for row in rows]):
                running = [rows[index] for index in batch]
                while running := [row for row in running if not row.done]:
                    logits = self._logits([row.tokens for row in running], [1] * len(running))
                    for row, scores in zip(running, logits, strict=True):
                        self._extend(row, int(scores.argmax()))
                work.advance(len(batch))
        return [
            postprocess_generated_text(self.tokenizer.decode(row.new, skip_special_tokens=True), row.stops, None)
            for row in rows
        ]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each (text, context, continuation): log-likelihood of the continuation, and whether it is greedy."""
        rows = []
        for text, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                what = "a window" if text is None else repr(text[1][:40])
                accepted = f"accepted are 1 to {self.max_length}, the model's positions"
                raise InputError(f"continuation {what}: it has {len(continuation)} tokens; {accepted}")
            # the last token is only predicted: it takes no position
            rows.append([*context, *continuation][-self.max_length - 1 : -1])
        results = [(0.0, False)] * len(rows)
        with progress.task("Log-likelihoods", len(rows)) as work:
            for batch in self._batches([len(row) for row in rows]):
                targets = [torch.tensor(requests[index][2]) for index in batch]
                logits = self._logits([rows[index] for index in batch], [len(target) for target in targets])
                for index, scores, target in zip(batch, logits, targets, strict=True):
                    target = target.to(scores.device)
                    chosen = scores.log_softmax(-1).gather(-1, target[:, None])
                    results[index] = float(chosen.sum()), bool((scores.argmax(-1) == target).all())
                work.advance(len(batch))
        return results

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of rows in batches of similar lengths, the longest first: what does not fit fails at once."""
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        for begin in range(0, len(order), self.batch_size):
            yield order[begin : begin + self.batch_size]

    def _logits(self, rows: Sequence[Sequence[int]], counts: Sequence[int]) -> list[Tensor]:
        """Logits float32 [count, vocab] of the last `count` positions of each row.

        Rows are padded on the right, which no position of a causal model looks at.
        """
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for padded, row in zip(ids, rows, strict=True):
            padded[: len(row)] = torch.tensor(row)
        with torch.inference_mode():
            logits = torch.as_tensor(self._logits_fn(ids))
            chosen = [
                scores[len(row) - count : len(row)].float()
                for scores, row, count in zip(logits, rows, counts, strict=True)
            ]
        if any(bool(scores.isnan().any()) for scores in chosen):
            raise NumericsError("tasks: the model's logits are nan; accepted are numbers")
        return chosen

    def _row(self, context: str, options: dict[str, Any]) -> _Generation:
        settings = normalize_gen_kwargs(options, _MAX_NEW_TOKENS)
        if settings["do_sample"]:
            raise InputError(f"generation_kwargs {options}: the task samples; accepted is greedy generation")
        end = None if self.eot_token_id is None else self.tokenizer.decode([self.eot_token_id])
        limit = settings["max_gen_toks"]
        if not 0 < limit < self.max_length:
            accepted = f"accepted are 1 to {self.max_length - 1}, which leaves the context a position"
            raise InputError(f"max_gen_toks={limit}: {accepted}")
        tokens = self.tok_encode(context)[-(self.max_length - limit) :] or [self.prefix_token_id]
        return _Generation(tokens, len(tokens), limit, handle_stop_sequences(settings["until"], end))

    def _extend(self, row: _Generation, token: int) -> None:
        row.tokens.append(token)
        text = self.tokenizer.decode(row.new, skip_special_tokens=False)
        stopped = token == self.eot_token_id or any(stop and stop in text for stop in row.stops)
        row.done = stopped or len(row.new) == row.limit


@dataclasses.dataclass
class _Generation:
    """A context of `start` tokens with what was generated after it."""

    tokens: list[int]
    start: int
    limit: int
    stops: list[str]
    done: bool = False

    @property
    def new(self) -> list[int]:
        return self.tokens[self.start :]


def load_tasks(names: Sequence[str], task_dir: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Tasks, groups or tags of lm-evaluation-harness with their data sets, for `evaluate_tasks`.

    `task_dir` holds YAML files of further tasks. Seeds `random` and numpy as the harness does, since some tasks
    shuffle. Raises ConfigError for a name that is none, InputError where a data set cannot be loaded.
    """
    if task_dir is not None and not Path(task_dir).is_dir():
        raise ConfigError(f"task_dir {str(task_dir)!r}: no such directory; accepted is one that holds tasks in YAML")
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    with _silent():
        with progress.task("Reading the names of tasks"):
            manager = TaskManager(include_path=task_dir)
        for name in names:
            if name not in manager.task_index:
                listing = "python -m lm_eval ls tasks" + (f" --include_path {task_dir}" if task_dir else "")
                raise ConfigError(f"task {name!r}: there is none of this name; accepted is what `{listing}` prints")
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in names:
            try:
                with progress.task(f"Loading the data of {name}"):
                    found = manager.load([name])
            except Exception as error:  # the hub's, the file system's and the task's own errors
                raise InputError(f"task {name!r}: its data set cannot be loaded: {one_line(error)}") from error
            for kind, entries in loaded.items():
                entries.update(found.get(kind, {}))
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"task {name!r}: it runs code that models write, or needs images; accepted are texts")
    return loaded


def evaluate_tasks(
    model: HarnessModel, tasks: dict[str, Any], *, limit: int | None = None, num_fewshot: int | None = None
) -> tuple[TaskScore, ...]:
    """Every metric of what `load_tasks` gave, on the first `limit` documents of each task.

    `num_fewshot` examples come before each question, except in tasks that allow none; None: as the task has it.
    Raises InputError for requests that the model cannot answer, NumericsError where its logits are not numbers.
    """
    for task in tasks["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0:
            task.set_config(key="num_fewshot", value=(own or 0) if num_fewshot is None else num_fewshot)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    with _silent():
        results = lm_eval.evaluate(model, tasks, limit=limit, bootstrap_iters=_RESAMPLES, log_samples=False)
    scores = []
    for name, values in results["results"].items():
        for key, value in values.items():
            metric, _, source = key.partition(",")
            if not source or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{source}")
            scores.append(
                TaskScore(
                    name,
                    metric if source == "none" else f"{metric} ({source})",
                    float(value),
                    float(stderr) if isinstance(stderr, (int, float)) else None,
                    results["n-shot"].get(name, 0),
                    results["n-samples"].get(name, {}).get("effective", 0),
                )
            )
    return tuple(scores)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what lm_eval and the hub print, log and draw, and without the processes lm_eval forks for a bootstrap."""
    # Not `tqdm.__init__`, which is another object each time where somebody has put a partial method there before.
    draw = vars(tqdm)["__init__"]
    level, forks = logging.root.manager.disable, os.environ.get("DISABLE_MULTIPROC")
    logging.disable(max(level, logging.WARNING))
    tqdm.__init__ = functools.partialmethod(draw, disable=True)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
        tqdm.__init__ = draw
        if forks is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = forks
