"""Tasks of lm-evaluation-harness against its own model of Hugging Face, and what `evaluate` says of it all."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import teq_graph
from teq_graph.cli import opening, run
from teq_graph.compiled import CompiledModel
from teq_graph.errors import ConfigError, InputError, NumericsError
from teq_graph.evaluation import divergence
from teq_graph.evaluation import tasks as evaluation_tasks
from teq_graph.evaluation.tasks import HarnessModel, TaskScore, evaluate_tasks, load_tasks
from teq_graph.loading import LoadedModel, load_model
from teq_graph.onnx.runtime import OnnxDecoder

POSITIONS = 512  # of stories260K
NAMES = ("tiny_choice", "tiny_last_word", "tiny_rolling", "tiny_generate")
PAPER = ("lambada_openai", "hellaswag", "winogrande", "piqa")
STORIES = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
    "Tom had a red ball. He threw the ball to his dog. The dog was happy and ran after the ball.",
    "One day, a big bear came to the forest. The bear was very hungry. He wanted to eat some honey.",
    'Mom said, "Do not go near the water." But Tim did not listen. He fell in and got very wet.',
    "The sun was hot. Anna and Ben sat under a tree. They ate apples and told each other stories.",
    "Ünïcode, 5 × 7 = 35 and a tab\tare not what stories for children are made of, said the old owl.",
]


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of the four kinds of request, with their data beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {
            "text": story,
            "context": story.rsplit(" ", 1)[0],
            "last": story.rsplit(" ", 1)[1],
            "endings": [story.rsplit(" ", 3)[1], "a", "the cat sat down."],
            "label": index % 3,
        }
        for index, story in enumerate([*STORIES, " ".join(STORIES * 5)])  # the last is longer than the model
    ]
    (folder / "documents.jsonl").write_text("".join(f"{json.dumps(document)}\n" for document in documents))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "documents.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "fewshot_split": "test",
    }

    def metric(name: str, aggregation: str = "mean") -> dict[str, Any]:
        return {"metric": name, "aggregation": aggregation, "higher_is_better": True}

    kinds = {
        "tiny_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{endings}}",
            "doc_to_target": "label",
            "metric_list": [metric("acc"), metric("acc_norm")],
        },
        "tiny_last_word": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{' ' + last}}",
            "metric_list": [metric("perplexity", "perplexity"), metric("acc")],
        },
        "tiny_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [metric("word_perplexity", "weighted_perplexity"), metric("bits_per_byte", "bits_per_byte")],
        },
        "tiny_generate": {
            "output_type": "generate_until",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{last}}",
            "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 24},
            "metric_list": [metric("exact_match")],
        },
    }
    for name, kind in kinds.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **kind}))
    return folder


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the harness's own tasks, whose 14 thousand files take seconds to read, and without network and caches."""
    monkeypatch.setattr(evaluation_tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def stories(data_dir: Path) -> LoadedModel:
    return load_model(data_dir / "models" / "stories260K")


@pytest.fixture(scope="module")
def compiled(stories: LoadedModel) -> CompiledModel:
    quantization = teq_graph.QuantizationConfig(bits=4, group_size=32)
    return teq_graph.compile(stories.model, quantization=quantization, training=None, tokenizer=stories.tokenizer)


@pytest.fixture(scope="module")
def exported(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled.export_onnx(tmp_path_factory.mktemp("exported") / "out", accuracy_level=1)


def plain(stories: LoadedModel, **options: Any) -> HarnessModel:
    return HarnessModel(opening.torch_logits(stories.model), stories.tokenizer, POSITIONS, **options)


def harness_own(stories: LoadedModel) -> HFLM:
    """Without its cache, which scores the wrong positions where two requests split the same tokens differently."""
    return HFLM(pretrained=stories.model, tokenizer=stories.tokenizer, batch_size=1, logits_cache=False)


def scores_of(model: HarnessModel, task_dir: Path, **options: Any) -> tuple[TaskScore, ...]:
    return evaluate_tasks(model, load_tasks(NAMES, task_dir), **options)


def values(scores: tuple[TaskScore, ...]) -> dict[tuple[str, str], float]:
    return {(score.task, score.metric): score.value for score in scores}


def requests_of(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


# ------------------------------------------------------------------------------------- against the harness's own model


@pytest.mark.parametrize("num_fewshot", [None, 2])
def test_scores_are_those_of_the_harness_own_model(
    stories: LoadedModel, task_dir: Path, num_fewshot: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    expected = lm_eval.simple_evaluate(
        harness_own(stories),
        tasks=list(NAMES),
        task_manager=TaskManager(include_path=task_dir, include_defaults=False),
        num_fewshot=num_fewshot,
        bootstrap_iters=1000,
    )
    scores = scores_of(plain(stories), task_dir, num_fewshot=num_fewshot)
    assert {score.task for score in scores} == set(NAMES)
    for score in scores:
        results = expected["results"][score.task]
        assert score.value == pytest.approx(results[f"{score.metric},none"], rel=1e-5)
        stderr = results[f"{score.metric}_stderr,none"]
        assert score.stderr == (None if stderr == "N/A" else pytest.approx(stderr, rel=1e-4))
        assert score.num_fewshot == (num_fewshot or 0)
        assert score.samples == len(STORIES) + 1


def test_answers_are_those_of_the_harness_own_model(stories: LoadedModel) -> None:
    own, model = harness_own(stories), plain(stories)
    long = " ".join(STORIES * 6)
    pairs = [
        *((story[:40], story[40:]) for story in STORIES),
        ("", "Once upon a time"),
        ("trailing space ", "moves"),
        ("<s>Once upon", " a time"),
        (long, " The end."),
        ("x", long[:900]),
    ]
    expected = own.loglikelihood(requests_of("loglikelihood", pairs), disable_tqdm=True)
    actual = model.loglikelihood(requests_of("loglikelihood", pairs), disable_tqdm=True)
    for (value, greedy), (own_value, own_greedy) in zip(actual, expected, strict=True):
        assert value == pytest.approx(own_value, rel=1e-5) and greedy == own_greedy
    texts = [(story,) for story in [*STORIES, long, long * 3]]
    assert model.loglikelihood_rolling(requests_of("loglikelihood_rolling", texts)) == pytest.approx(
        own.loglikelihood_rolling(requests_of("loglikelihood_rolling", texts), disable_tqdm=True), rel=1e-5
    )
    prompts: list[tuple[Any, ...]] = [
        *((story[:30], {"until": ["."], "max_gen_toks": 30}) for story in STORIES),
        (STORIES[0], {"until": [" the ", "\n\n"], "max_new_tokens": 20}),
        (STORIES[0], {"max_gen_toks": 3}),
        (STORIES[0], {}),  # up to the end of the story
        (long, {"until": "."}),
    ]
    assert model.generate_until(requests_of("generate_until", prompts)) == own.generate_until(
        requests_of("generate_until", prompts), disable_tqdm=True
    )


def test_greedy_is_told(stories: LoadedModel) -> None:
    model = plain(stories)
    (best,) = model.generate_until(requests_of("generate_until", [("Once upon a time", {"max_gen_toks": 4})]))
    answers = model.loglikelihood(
        requests_of("loglikelihood", [("Once upon a time", best), ("Once upon a time", " xyz")]), disable_tqdm=True
    )
    assert [greedy for _, greedy in answers] == [True, False]


# ------------------------------------------------------------------------------------------------- runtimes and batches


def test_onnxruntime_and_the_compiled_graph_agree(
    stories: LoadedModel, compiled: CompiledModel, exported: Path, task_dir: Path
) -> None:
    graph = HarnessModel(lambda ids: compiled(ids).logits, compiled.tokenizer, POSITIONS)
    decoder = OnnxDecoder.load(exported, threads=1)
    onnx = HarnessModel(opening.onnx_logits(decoder), decoder.tokenizer, decoder.shape.max_positions)
    expected, actual = values(scores_of(graph, task_dir)), values(scores_of(onnx, task_dir))
    assert actual == pytest.approx(expected, rel=1e-4)
    assert actual != pytest.approx(values(scores_of(plain(stories), task_dir)), rel=1e-4)


@pytest.mark.parametrize("runtime", ["PyTorch", "compiled", "onnxruntime"])
def test_right_padding_is_exact(runtime: str, stories: LoadedModel, compiled: CompiledModel, exported: Path) -> None:
    functions: dict[str, Callable[[], Any]] = {
        "PyTorch": lambda: opening.torch_logits(stories.model),
        "compiled": lambda: lambda ids: compiled(ids).logits,
        "onnxruntime": lambda: opening.onnx_logits(OnnxDecoder.load(exported, threads=1)),
    }
    function = functions[runtime]()
    pairs = [(story[: 8 * (index + 1)], story[8 * (index + 1) :]) for index, story in enumerate(STORIES)]
    prompts = [(story[: 8 * (index + 1)], {"until": ["."], "max_gen_toks": 20}) for index, story in enumerate(STORIES)]
    answers = []
    for batch_size in (1, 4, 100):
        model = HarnessModel(function, stories.tokenizer, POSITIONS, batch_size)
        found = model.loglikelihood(requests_of("loglikelihood", pairs), disable_tqdm=True)
        answers.append(
            (
                [value for value, _ in found],
                [greedy for _, greedy in found],
                model.generate_until(requests_of("generate_until", prompts)),
            )
        )
    for likelihoods, greedy, texts in answers[1:]:
        assert likelihoods == pytest.approx(answers[0][0], rel=1e-5)
        assert (greedy, texts) == answers[0][1:]


def test_batches_are_no_larger_and_windows_no_longer_than_asked(stories: LoadedModel) -> None:
    shapes: list[tuple[int, ...]] = []

    def logits(ids: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return stories.model(ids).logits

    model = HarnessModel(logits, stories.tokenizer, max_length=16, batch_size=3)
    pairs = [(story, " The end.") for story in STORIES]
    answers = model.loglikelihood(requests_of("loglikelihood", pairs), disable_tqdm=True)
    model.loglikelihood_rolling(requests_of("loglikelihood_rolling", [(STORIES[0],)]))
    model.generate_until(requests_of("generate_until", [(STORIES[0], {"max_gen_toks": 10})]))
    assert max(rows for rows, _ in shapes) == 3
    assert max(length for _, length in shapes) == 16
    # what is left of a long context is its end
    ids = model.tok_encode(STORIES[0] + " The end.")
    count = len(ids) - len(model.tok_encode(STORIES[0]))
    scores = stories.model(torch.tensor([ids[-17:-1]])).logits[0, -count:].log_softmax(-1).detach()
    expected = float(scores.gather(-1, torch.tensor(ids[-count:])[:, None]).sum())
    assert answers[0][0] == pytest.approx(expected, rel=1e-5)


def test_limit(stories: LoadedModel, task_dir: Path) -> None:
    scores = evaluate_tasks(plain(stories), load_tasks(["tiny_choice"], task_dir), limit=3)
    assert {score.samples for score in scores} == {3}
    assert [score.metric for score in scores] == ["acc", "acc_norm"]


def test_the_run_is_silent_and_leaves_nothing_behind(
    stories: LoadedModel, task_dir: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    from tqdm import tqdm

    before = vars(tqdm)["__init__"]
    scores_of(plain(stories), task_dir, num_fewshot=1)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert vars(tqdm)["__init__"] is before


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_the_model_cannot_answer(stories: LoadedModel) -> None:
    model = HarnessModel(opening.torch_logits(stories.model), stories.tokenizer, max_length=16)
    with pytest.raises(InputError, match=r"tokens; accepted are 1 to 16"):
        model.loglikelihood(requests_of("loglikelihood", [("Once", STORIES[0])]), disable_tqdm=True)
    with pytest.raises(InputError, match="max_gen_toks=16: accepted are 1 to 15"):
        model.generate_until(requests_of("generate_until", [("Once", {"max_gen_toks": 16})]))
    with pytest.raises(InputError, match="accepted is greedy generation"):
        model.generate_until(requests_of("generate_until", [("Once", {"do_sample": True, "temperature": 1.0})]))


def test_logits_that_are_no_numbers(stories: LoadedModel, task_dir: Path) -> None:
    model = HarnessModel(lambda ids: torch.full((*ids.shape, 512), torch.nan), stories.tokenizer, POSITIONS)
    for name in NAMES:
        with pytest.raises(NumericsError, match="logits are nan"):
            evaluate_tasks(model, load_tasks([name], task_dir))


def test_a_tokenizer_without_special_tokens() -> None:
    class Bare:
        bos_token_id = eos_token_id = None

    with pytest.raises(InputError, match="no token that begins or ends a text"):
        HarnessModel(lambda ids: ids, Bare())


def test_bad_tasks(task_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task 'tiny': there is none .* `python -m lm_eval ls tasks --include_path"):
        load_tasks(["tiny"], task_dir)
    with pytest.raises(ConfigError, match="no such directory"):
        load_tasks(["tiny"], tmp_path / "nothing")
    missing = {"task": "missing", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "no.jsonl")}}
    kind = {"output_type": "loglikelihood_rolling", "test_split": "train", "doc_to_text": "", "doc_to_target": "text"}
    (tmp_path / "missing.yaml").write_text(json.dumps({**missing, **kind}))
    with pytest.raises(InputError, match="task 'missing': its data set cannot be loaded: "):
        load_tasks(["missing"], tmp_path)


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `evaluate`, which exits 2 with one line on stderr; returns that line."""

    def check(*arguments: Any) -> str:
        assert run(["evaluate", *map(str, arguments)]) == 2
        printed, errors = capsys.readouterr()
        assert printed == ""
        assert re.fullmatch(r"error: [^\n]+\n", errors), errors
        return errors.removeprefix("error: ").rstrip("\n")

    return check


@pytest.fixture
def stories_dir(data_dir: Path) -> Path:
    return data_dir / "models" / "stories260K"


def test_evaluate_prints_the_scores(
    stories: LoadedModel, stories_dir: Path, exported: Path, task_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = values(scores_of(plain(stories), task_dir))
    tasks = ["--tasks", ", ".join(NAMES), "--task-dir", str(task_dir)]
    assert run(["evaluate", str(stories_dir), *tasks]) == 0
    lines = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["model", f"{stories_dir}, in PyTorch"]
    assert lines[1] == ["context", str(POSITIONS)]
    assert lines[3][:3] == ["task", "metric", "value"]
    assert {(task, metric): value for task, metric, value, *_ in lines[4:]} == {
        key: f"{value:.4f}" for key, value in expected.items()
    }
    assert {line[-1] for line in lines[4:]} == {str(len(STORIES) + 1)}
    assert (
        run(["evaluate", str(exported), *tasks, "--limit", "2", "--context", "128", "--batch-size", "1", "--json"]) == 0
    )
    content = json.loads(capsys.readouterr().out)
    assert (content["runtime"], content["context"]) == ("onnxruntime", 128)
    assert {(one["task"], one["metric"]) for one in content["tasks"]} == set(expected)
    assert {one["samples"] for one in content["tasks"]} == {2}


def test_contradictions(refused: Callable[..., str]) -> None:
    for option in ("--text", "--tokens", "--stride", "--reference"):
        line = refused("nothing", "--tasks", "piqa", option, "5")
        assert line == f"{option}: no effect with --tasks, which bring their own texts"
    for option in ("--limit", "--num-fewshot", "--task-dir", "--batch-size"):
        assert refused("nothing", option, "5") == f"{option}: no effect with a text, for --tasks only"
    assert "--limit 0: accepted are 1 to" in refused("nothing", "--tasks", "piqa", "--limit", "0")
    assert "--num-fewshot -1: accepted are 0 to" in refused("nothing", "--tasks", "piqa", "--num-fewshot", "-1")
    assert "accepted are names of tasks" in refused("nothing", "--tasks", " , ")
    assert "--context 1: accepted are 2 to" in refused("nothing", "--tasks", "piqa", "--context", "1")


def test_a_name_that_is_no_task(task_dir: Path, refused: Callable[..., str]) -> None:
    line = refused("nothing", "--tasks", "tiny_choice,lambda", "--task-dir", task_dir)
    assert line.startswith("task 'lambda': there is none of this name; accepted is what `python -m lm_eval ls tasks")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]) -> None:
    monkeypatch.delitem(sys.modules, "teq_graph.evaluation.tasks")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert refused("nothing", "--tasks", "piqa") == "--tasks: needs the package lm-eval; pip install teq-graph[tasks]"


@pytest.mark.slow
def test_the_tasks_of_the_paper_resolve_and_fail_in_one_line_offline(refused: Callable[..., str]) -> None:
    """Each name has its YAML; what is missing is the data, whose name the error gives."""
    manager = TaskManager()
    for name in PAPER:
        entry = manager.task_index[name]
        assert entry.cfg is not None and entry.cfg["dataset_path"].count("/") == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation_tasks, "TaskManager", lambda **_: manager)
        for name in PAPER:
            assert f"task '{name}': its data set cannot be loaded: " in refused("nothing", "--tasks", name)
        assert "task 'lambada_opnai': there is none" in refused("nothing", "--tasks", "piqa,lambada_opnai")


# -------------------------------------------------------------------------------------- perplexity: what is printed


def test_evaluate_says_how_windows_lie(stories_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stride, expected in ((None, "do not overlap"), (512, "do not overlap"), (64, "stride 64: each predicts")):
        option = [] if stride is None else ["--stride", str(stride)]
        assert run(["evaluate", str(stories_dir), "--tokens", "600", *option]) == 0
        assert re.search(rf"^windows +{expected}", capsys.readouterr().out, re.MULTILINE)


def test_reference(
    stories: LoadedModel, stories_dir: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(STORIES), encoding="utf-8")
    command = ["evaluate", str(exported), "--text", str(text), "--reference", str(stories_dir), "--context", "64"]
    assert run([*command, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)["reference"]
    assert stories.tokenizer is not None
    ids = stories.tokenizer("\n".join(STORIES))["input_ids"]
    decoder = OnnxDecoder.load(exported)
    expected = divergence(opening.torch_logits(stories.model), opening.onnx_logits(decoder), ids, context=64)
    assert content["model"] == str(stories_dir)
    assert content["tokens"] == expected.tokens == len(ids)
    assert content["kl_divergence"] == pytest.approx(expected.kl_divergence, rel=1e-4)
    assert content["top1_agreement"] == pytest.approx(expected.top1_agreement)
    assert 0 < expected.kl_divergence < 1
    assert run(command) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^KL divergence +{expected.kl_divergence:.5f} nats", printed, re.MULTILINE)
    assert re.search(rf"^top-1 agreement +{expected.top1_agreement:.2%}$", printed, re.MULTILINE)


def test_a_reference_with_other_tokens(stories_dir: Path, data_dir: Path, refused: Callable[..., str]) -> None:
    other = data_dir / "models" / "babyllama-1m"
    assert "accepted is a model with the same tokenizer" in refused(stories_dir, "--reference", other)
