"""Nothing in a directory that is loaded runs: payloads at every place that a reader could take for code."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.architectures import GQA, VOCAB
from support.compiling import compile_llama, compile_with_kwargs, in_one_line

import teq_graph
from teq_graph import loading
from teq_graph.errors import ModelFileError
from teq_graph.loading import load_model


class Payload:
    """Leaves a marker where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it ran"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with inputs by name, of which one is a number, and with results in a dict."""
    return compile_with_kwargs().save(tmp_path_factory.mktemp("trust") / "saved")


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "saved")
    return tmp_path / "saved"


def refused(directory: Path, marker: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        teq_graph.load(directory, verify=False)
    assert not marker.exists()
    return in_one_line(caught)


def test_the_marker_is_seen(marker: Path) -> None:
    pickle.loads(pickle.dumps(Payload(marker))).close()
    assert marker.exists()


# ------------------------------------------------------------------------------------------------------------- pickles


@pytest.mark.parametrize("payload_is_in", ["graph.pt2", "equivalences.pt"])
def test_an_old_directory_is_refused_before_it_is_read(payload_is_in: str, tmp_path: Path, marker: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "compiled.json").write_text(json.dumps({"format_version": 2, "decoder": None, "lm_head": None}))
    torch.save(Payload(marker), old / payload_is_in)
    message = refused(old, marker)
    assert "format_version=2, accepted is 4: compile the model again with this version and save it" in message


@pytest.mark.parametrize("file", ["tensors.safetensors", "graph.json", "compiled.json", "report.json"])
@pytest.mark.parametrize("writer", [pickle.dump, torch.save])
def test_a_pickle_in_the_place_of_a_file(file: str, writer: Callable[..., Any], directory: Path, marker: Path) -> None:
    with (directory / file).open("wb") as opened:
        writer(Payload(marker), opened)
    assert file in refused(directory, marker)


def test_pickles_beside_the_files_are_not_read(directory: Path, marker: Path) -> None:
    for name in ("graph.pt2", "equivalences.pt", "pytorch_model.bin", "data.pkl"):
        torch.save(Payload(marker), directory / name)
    teq_graph.load(directory, verify=False)
    assert not marker.exists()


# --------------------------------------------------------------------------------------------------- names and targets

CODE = '__import__("pathlib").Path("MARKER").touch()'
"""An expression that leaves the marker."""


def _first(graph: Any, op: str) -> Any:
    return next(node for node in graph["nodes"] if node["op"] == op)


def _rename(old: str, new: str) -> Callable[[Any], Any]:
    """The whole graph with one name changed wherever it stands, so that nothing else is wrong with it."""

    def edit(graph: Any) -> Any:
        name = {"a node": _first(graph, "call_function")["name"], "an input": _first(graph, "placeholder")["name"]}[old]
        text = json.dumps(graph)
        assert json.dumps(name) in text
        return json.loads(text.replace(json.dumps(name), json.dumps(new)))

    return edit


def _set(*path: Any, value: Any) -> Callable[[Any], Any]:
    """One place of the graph changed; of a path, `op` names the first node of that kind."""

    def edit(graph: Any) -> Any:
        place = _first(graph, path[0]) if path[0] in ("call_function", "get_attr", "placeholder") else graph[path[0]]
        for part in path[1:-1]:
            place = place[part]
        if len(path) == 1:
            graph[path[0]] = value
        else:
            place[path[-1]] = value
        return graph

    return edit


def _attribute(target: str) -> Callable[[Any], Any]:
    return _set("get_attr", "target", value=target)


def _results(kind: str, type_: str) -> Callable[[Any], Any]:
    return _set("outputs", value={"kind": kind, "children": [None, None], "type": type_})


CALLS = (
    *("os.system", "torch.load", "builtins.eval", "eval", "exec", "operator.attrgetter", "operator.methodcaller"),
    *("os::system.default", "builtins::eval.default", "teq_graph::__class__.__init__", "aten::__dict__.get"),
    *("aten::name.upper", "torch.ops.load_library", "ops::load_library.default", "operator.lshift", "math.factorial"),
    # what torch does know, and what would write a file, print, change its arguments or read memory anywhere
    *(
        "aten::save.default",
        "aten::from_file.default",
        "aten::_print.default",
        "aten::add_.Tensor",
        "aten::set_.default",
    ),
    *("inductor::_reinterpret_tensor.default", "prim::Print.default", "profiler::_record_function_enter.default"),
    *("", "::.", "aten::", "aten::relu", "aten.relu.default", "aten::relu.default.x", "aten::relu.nothing", CODE),
)

HOSTILE: dict[str, Callable[[Any], Any]] = {
    "a node's name": _rename("a node", f"x = {CODE}; y"),
    "a node's name, two lines": _rename("a node", f"x\n    {CODE}\n    y"),
    "a node's name, a keyword": _rename("a node", "import"),
    "a node's name, self": _rename("a node", "self"),
    "a node's name, a module": _rename("a node", "torch"),
    "an input's name": _rename("an input", f"x={CODE}"),
    "an input's target": _set("placeholder", "target", value=f"x = {CODE} #"),
    "a star": _set("placeholder", "target", value="*x"),
    "an argument": _set("arguments", 0, value=f"x={CODE}"),
    "an argument twice": _set("arguments", value=["x", "x", "x"]),
    "a key": _set("inputs", "children", 1, "keys", 0, value=f"x':{CODE}, 'y"),
    "a keyword of a call": _set("call_function", "kwargs", value={f"x={CODE}, y": None}),
    "an attribute with a quote": _attribute(f'0.x"); {CODE}; ("'),
    "an attribute with two lines": _attribute(f"0.x\n    {CODE}"),
    "an attribute with a backslash": _attribute("0.x\\"),
    "an attribute in brackets": _attribute(f"0.x[{CODE}]"),
    "an attribute with empty parts": _attribute("first..bias"),
    "an attribute of every object": _attribute("__class__.__init__"),
    "an attribute of every module": _attribute("forward.weight"),
    "an attribute that is private": _attribute("_buffers.weight"),
    "no tensor": _set("get_attr", "tensor", value="nothing"),
    "no order of dimensions": _set("get_attr", "order", value=[1]),
    "a call of a method": _set("call_function", "op", value="call_method"),
    "a call of a module": _set("call_function", "op", value="call_module"),
    "a node before itself": lambda graph: {**graph, "nodes": graph["nodes"][::-1]},
    "a node of two names": lambda graph: {**graph, "nodes": [*graph["nodes"][:1], *graph["nodes"]]},
    "a number of no size": _set("call_function", "args", value=[2**70]),
    "a node that is not there": _set("call_function", "args", 0, value={"node": "nothing"}),
    "a tensor as an argument": _set("call_function", "args", 0, value={"tensor": "nothing"}),
    "an argument of no kind": _set("call_function", "args", 0, value={"function": "os.system"}),
    "an argument of two kinds": _set("call_function", "args", 0, value={"float": "inf", "dtype": "float32"}),
    "a dtype": _set("call_function", "args", 0, value={"dtype": "load"}),
    "a layout": _set("call_function", "args", 0, value={"layout": "__class__"}),
    "a device": _set("call_function", "args", 0, value={"device": f"cpu') or {CODE} or ('"}),
    "a text where a number is wanted": _set("call_function", "args", value=[CODE]),
    "sizes that are no numbers": _set("placeholder", "sizes", value=[{"text": CODE}, 20]),
    "sizes of another rank": _set("placeholder", "sizes", value=["s0"]),
    "sizes of another example": _set("placeholder", "sizes", value=["s0", 21]),
    "an example that is no tensor": _set("example", 0, value=3),
    "an example of another": _set("example", 0, value={"node": "x"}),
    "too few examples": _set("example", value=[]),
    "results of a class": _results("class", "subprocess:Popen"),
    "results of a function": _results("class", "os:system"),
    "results of a built-in": _results("class", "builtins:eval"),
    "results of no name": _set("outputs", value={"kind": "class", "children": [None, None]}),
    "results of torch's": _results("class", "torch._higher_order_ops:FlatApply"),
    "results of a named tuple": _results("namedtuple", "subprocess:Popen"),
    "results of a factory": _set(
        "outputs",
        value={"kind": "defaultdict", "children": [], "context": {"default_factory_module": "chosen"}},
    ),
    "results of an enum": _set(
        "outputs",
        value={"kind": "dict", "children": [None, None], "keys": [{"__enum__": True, "fqn": "chosen:X"}, "b"]},
    ),
    "results of fewer keys": _set("outputs", value={"kind": "dict", "children": [None, None], "keys": ["a"]}),
    "results of fewer leaves": _set("outputs", value=None),
    "inputs that are none": _set("inputs", value={"kind": "list", "children": []}),
    **{f"a call of {target!r}": _set("call_function", "target", value=target) for target in CALLS},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_graph(kind: str, directory: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (marker.parent / "chosen.py").write_text(CODE.replace("MARKER", str(marker)))
    monkeypatch.syspath_prepend(marker.parent)
    file = directory / "graph.json"
    graph = json.loads(file.read_text())
    edited = json.dumps(HOSTILE[kind](copy.deepcopy(graph)))
    assert json.loads(edited) != graph
    file.write_text(edited.replace("MARKER", str(marker)))
    assert str(directory) in refused(directory, marker)


def test_expressions_of_sizes_are_names_and_no_more(directory: Path, marker: Path) -> None:
    file = directory / "graph.json"
    expression = CODE.replace("MARKER", str(marker))
    text = file.read_text()
    assert text.count('"s0"') == 2
    file.write_text(text.replace('"s0"', json.dumps(expression)))
    loaded = teq_graph.load(directory, verify=False)
    result = loaded(x=torch.randn(7, 20), gate=torch.randn(7, 32))
    loaded.save(directory.parent / "again")
    assert result["hidden"].shape == (7,) and not marker.exists()


@pytest.mark.parametrize("target", ["operator.mul", "operator.pow", "operator.add"])
@pytest.mark.parametrize("args", [[{"node": "x"}, {"node": "x"}], [[1], 2**40], ["long", 2**40], [2**62, 2**62]])
def test_numbers_stay_small(target: str, args: list[Any], directory: Path, marker: Path) -> None:
    """What looks like a computation of sizes would make lists, texts or numbers that fill the memory."""
    file = directory / "graph.json"
    graph = json.loads(file.read_text())
    place = next(i for i, node in enumerate(graph["nodes"]) if node["op"] == "call_function")
    graph["nodes"].insert(place, {"op": "call_function", "name": "much", "target": target, "args": args, "kwargs": {}})
    file.write_text(json.dumps(graph))
    refused(directory, marker)


# ------------------------------------------------------------------------------------------------------- Hugging Face's

SAVED, MODELS = (
    ("config", "config of a known type", "tokenizer"),
    (*("model", "model of a known type", "tokenizer of a model", "pickled weights", "custom generation"),),
)
ACCEPTED = ("config of a known type", "model of a known type", "custom generation")
"""Loaded, without the code: transformers has classes of its own for them."""

LOAD = """
import json, sys, teq_graph
from teq_graph.errors import TeqGraphError
from teq_graph.loading import load_model
results = {}
for kind, directory in json.loads(sys.argv[1]).items():
    try:
        (teq_graph.load if "saved" in directory else load_model)(directory)
        results[kind] = None
    except TeqGraphError as error:
        results[kind] = str(error)
print(json.dumps(results))
"""


def plant(directory: Path, kind: str, marker: Path) -> None:
    """Code beside a model, and a configuration that names it."""
    code = f"open({str(marker)!r}, 'w').close()\n"
    for name in ("configuration_x", "modeling_x", "tokenization_x"):
        (directory / f"{name}.py").write_text(f"{code}class X: pass\n")
    classes = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X", "AutoModel": "modeling_x.X"}
    if kind == "pickled weights":
        (directory / "model.safetensors").unlink()
        torch.save({"lm_head.weight": Payload(marker)}, directory / "pytorch_model.bin")
    elif kind == "custom generation":
        (directory / "custom_generate").mkdir()
        (directory / "custom_generate" / "generate.py").write_text(code)
    elif kind.startswith("tokenizer"):
        file = directory / "tokenizer_config.json"
        content = json.loads(file.read_text()) if file.exists() else {}
        auto_map = {"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]}
        file.write_text(json.dumps({**content, "tokenizer_class": "XTokenizer", "auto_map": auto_map}))
    else:
        content = json.loads((directory / "config.json").read_text())
        if "known" not in kind:
            content["model_type"], content["architectures"] = "x_unknown", ["XForCausalLM"]
        (directory / "config.json").write_text(json.dumps({**content, "auto_map": classes}))


def test_custom_code_is_not_run_and_not_asked_for(stories260k: Any, tmp_path: Path, marker: Path) -> None:
    """In a process whose terminal would answer «y»."""
    compile_llama(stories260k.model, tokenizer=stories260k.tokenizer).save(tmp_path / "whole" / "saved")
    stories260k.model.save_pretrained(tmp_path / "whole" / "model")
    stories260k.tokenizer.save_pretrained(tmp_path / "whole" / "model")
    directories = {}
    for kind in (*SAVED, *MODELS):
        directories[kind] = str(tmp_path / kind / ("saved" if kind in SAVED else "model"))
        shutil.copytree(tmp_path / "whole" / Path(directories[kind]).name, directories[kind])
        plant(Path(directories[kind]), kind, marker)
    process = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(directories)],
        input="y\n" * 100,
        cwd=Path(teq_graph.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert not marker.exists()
    assert "[y/N]" not in process.stdout + process.stderr
    for kind, message in json.loads(process.stdout.splitlines()[-1]).items():
        assert (message is None) == (kind in ACCEPTED), (kind, message)
        if message is not None:
            assert "\n" not in message and "trust_remote_code" not in message and "weights_only" not in message
            assert "is not run" in message


def test_a_model_whose_tokenizer_is_code_is_not_loaded_without_it(stories260k: Any, tmp_path: Path) -> None:
    """Where a tokenizer is optional, as on the hub, too."""
    stories260k.model.save_pretrained(tmp_path)
    plant(tmp_path, "tokenizer", tmp_path / "it ran")
    with pytest.raises(ModelFileError, match="custom code, which is not run") as caught:
        loading._load("an id", str(tmp_path), "id", "float32", tokenizer_expected=None)
    in_one_line(caught)


def test_attention_from_the_hub_is_refused(tmp_path: Path) -> None:
    """transformers would fetch and run a kernel that a configuration names as its attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**GQA)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attn_implementation": "someone/kernel"}))
    with pytest.raises(ModelFileError, match="'someone/kernel', custom code, which is not run") as caught:
        load_model(tmp_path)
    in_one_line(caught)


def test_pickled_weights_of_tensors_are_read(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**GQA))
    model.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    loaded = load_model(tmp_path).model
    tokens = torch.randint(3, VOCAB, (1, 5))
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
