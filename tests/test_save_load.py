"""`save` and `load`: what comes back, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.architectures import BY_NAME, GQA, Architecture
from support.compiling import (
    compile_llama,
    compile_mlp,
    compile_with_kwargs,
    in_one_line,
    tokens,
)
from support.graphs import leaves, randomize, relative_error
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves as leaves_of

import teq_graph
from teq_graph import QuantizationConfig
from teq_graph.errors import (
    ExportError,
    ModelFileError,
)
from teq_graph.loading import load_model
from teq_graph.saving import FORMAT_VERSION, TENSORS_FILE


def check_round_trip(compiled: teq_graph.CompiledModel, directory: Path, inputs: Any) -> teq_graph.CompiledModel:
    expected = leaves(compiled(**inputs) if isinstance(inputs, dict) else compiled(*inputs))
    compiled.save(directory)
    loaded = teq_graph.load(directory)
    before, after = compiled.graph_module.state_dict(), loaded.graph_module.state_dict()
    assert before.keys() == after.keys()
    assert all(
        torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype for name, tensor in after.items()
    )
    actual = leaves(loaded(**inputs) if isinstance(inputs, dict) else loaded(*inputs))
    assert relative_error(actual, expected) == 0
    assert loaded.report == compiled.report
    assert len(loaded.equivalences) == len(compiled.equivalences)
    for a, b in zip(loaded.equivalences, compiled.equivalences, strict=True):
        assert (a.producer, a.kind, a.channels, a.linears) == (b.producer, b.kind, b.channels, b.linears)
        assert (a.scale is None and b.scale is None) or torch.equal(a.scale, b.scale)
        assert all(torch.equal(x.index, y.index) for x, y in zip(a.multiplied, b.multiplied, strict=True))
    assert loaded.captured.decoder == compiled.captured.decoder and loaded.captured.lm_head == compiled.captured.lm_head
    return loaded


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_trip_of_codes(bits: int, tmp_path: Path) -> None:
    compiled = compile_mlp(quantization=QuantizationConfig(bits=bits, group_size=16, symmetric=bits == 3))
    check_round_trip(compiled, tmp_path / "saved", (torch.randn(7, 20),))


@pytest.mark.parametrize("name", ["Llama (GQA)", "Gemma2", "GPT-2"])
def test_round_trip_of_decoders(name: str, tmp_path: Path) -> None:
    architecture: Architecture = BY_NAME[name]
    compiled = compile_llama(architecture.build(), quantization=QuantizationConfig(bits=3, group_size=32))
    loaded = check_round_trip(compiled, tmp_path / "saved", {"input_ids": tokens(3, 11)})
    assert loaded.config.to_dict() | {"_name_or_path": ""} == compiled.config.to_dict() | {"_name_or_path": ""}
    prompt = tokens(2, 6)
    step = loaded(input_ids=prompt[:, :4])
    step = loaded(input_ids=prompt[:, 4:], past_key_values=step.past_key_values)
    assert relative_error(step.logits, compiled(input_ids=prompt).logits[:, 4:]) <= 1e-5


def test_round_trip_of_keyword_arguments_and_again(tmp_path: Path) -> None:
    inputs = {"x": torch.randn(6, 20), "gate": torch.randn(6, 32)}
    loaded = check_round_trip(compile_with_kwargs(), tmp_path / "saved", inputs)
    again = check_round_trip(loaded, tmp_path / "again", inputs)
    again.export_onnx(tmp_path / "onnx")


class Pair(NamedTuple):
    total: Tensor
    parts: dict[str, list[Tensor]]


class OddTensors(nn.Module):
    """Tensors of every kind that a file could get wrong, arguments of every kind that JSON could."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"en-de": nn.Linear(20, 48), "2": nn.Linear(48, 20)})
        self.tied = self.layers["en-de"].weight
        self.register_buffer("number", torch.tensor(3.5))
        self.register_buffer("mask", torch.rand(20) > 0.5)
        self.register_buffer("order", torch.randperm(20, dtype=torch.int32))
        self.register_buffer("halves", torch.randn(20).half())
        self.register_buffer("brain", torch.randn(20).bfloat16())
        self.register_buffer("none", torch.empty(0, 20))
        self.register_buffer("transposed", torch.randn(20, 7).t())
        self.register_buffer("part", torch.randn(9, 40)[2:5, 10:30])
        self.register_buffer("wide", torch.randn(1, 20).expand(4, 20))
        self.register_buffer("images", torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))

    def forward(self, x: Tensor, scale: float, name: str, count: int, flag: bool, nothing: None) -> Pair:
        hidden = self.layers["2"](self.layers["en-de"](x).relu()) * scale + count
        hidden = hidden.masked_fill(self.mask, float("-inf")).softmax(-1) + self.number
        hidden = hidden[:, self.order.long()] * self.halves.float() + self.brain.float()
        rows = torch.cat([self.none, self.part, self.wide, x @ self.tied.t() @ self.layers["2"].weight.t()])
        first, second = rows.split([7, x.shape[0]])
        chunks = [first @ self.transposed.t(), second[: x.shape[0] * 2 - 1, ..., ::2], self.images * 2.0]
        positions = torch.arange(max(x.shape[0], 2), dtype=torch.int16, device=x.device)
        return Pair(hidden, {"chunks": chunks, "positions": [positions]})


def compile_odd_tensors() -> teq_graph.CompiledModel:
    example = {"x": torch.randn(4, 20), "scale": 0.1, "name": "a 'name'", "count": 3, "flag": True, "nothing": None}
    shapes = {**dict.fromkeys(example), "x": {0: torch.export.Dim.DYNAMIC}}
    model = OddTensors().eval()
    return teq_graph.compile(model, example, shapes, quantization=QuantizationConfig(4, 16), training=None)


def test_round_trip_of_odd_tensors_and_arguments(tmp_path: Path) -> None:
    compiled = compile_odd_tensors()
    loaded = check_round_trip(compiled, tmp_path / "saved", {"x": torch.randn(9, 20)})
    assert type(loaded(x=torch.randn(3, 20))) is Pair
    strides = {name: tensor.stride() for name, tensor in compiled.graph_module.state_dict().items()}
    kept = {name: tensor.stride() for name, tensor in loaded.graph_module.state_dict().items()}
    assert {name for name in strides if strides[name] != kept[name]} == {"part", "wide"}
    assert loaded.captured.example_kwargs.keys() == compiled.captured.example_kwargs.keys()


def folder(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("name", ["odd", "Llama (GQA)", "BERT (post-LN)"])
def test_saved_again_it_is_the_same(name: str, tmp_path: Path) -> None:
    compiled = compile_odd_tensors() if name == "odd" else compile_llama(BY_NAME[name].build())
    compiled.save(tmp_path / "first")
    loaded = teq_graph.load(tmp_path / "first")
    loaded.save(tmp_path / "second")
    first, second = (folder(tmp_path / name) for name in ("first", "second"))
    for content in (first, second):
        content.pop("compiled.json")  # says when it was made
    assert first == second
    assert loaded.graph_module.code == compiled.graph_module.code


@pytest.mark.parametrize("name", ["Llama (GQA)", "Gemma2", "BERT (post-LN)", "T5"])
def test_exported_after_loading_it_is_the_same(name: str, tmp_path: Path) -> None:
    compiled = compile_llama(BY_NAME[name].build())
    compiled.save(tmp_path / "saved")
    loaded = teq_graph.load(tmp_path / "saved").to("cpu")
    for model, target in ((compiled, "compiled"), (loaded, "loaded")):
        model.export_onnx(tmp_path / target, accuracy_level=1)
    expected, actual = folder(tmp_path / "compiled"), folder(tmp_path / "loaded")
    assert expected.keys() == actual.keys()
    assert all(actual[file] == content for file, content in expected.items() if file.startswith("model.onnx"))


@pytest.mark.parametrize("name", ["Llama (GQA)", "Gemma3 (text)", "ViT", "MLP"])
def test_what_each_node_gives_is_known_after_loading(name: str, tmp_path: Path) -> None:
    """Types, fixed sizes, and which sizes are equal: passes and checks of inputs read them."""
    architecture = BY_NAME[name]
    compiled = compile_llama(
        architecture.build().bfloat16(), example_inputs=halved(architecture.example_inputs),
        dynamic_shapes=architecture.dynamic_shapes,
    )  # fmt: skip
    compiled.save(tmp_path / "saved")
    loaded = teq_graph.load(tmp_path / "saved")

    def described(model: teq_graph.CompiledModel) -> list[Any]:
        symbols: dict[str, int] = {}

        def describe(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.dtype, value.device, [describe(size) for size in value.shape]
            text = str(value.node.expr) if isinstance(value, torch.SymInt) else ""
            for symbol in re.findall(r"s\d+", text):
                text = re.sub(rf"\b{symbol}\b", f"n{symbols.setdefault(symbol, len(symbols))}", text)
            text = " + ".join(sorted(text.split(" + ")))
            return text or type(value).__name__ if not isinstance(value, int) else value

        nodes = [node for node in model.graph_module.graph.nodes if node.op != "output"]
        return [(node.name, *map(describe, leaves_of(node.meta["val"]))) for node in nodes]

    assert described(loaded) == described(compiled)


def halved(inputs: Any) -> Any:
    return inputs and tuple(tensor.bfloat16() for tensor in inputs)


def test_without_the_device_it_was_on_it_is_on_the_cpu(tmp_path: Path) -> None:
    compiled = compile_odd_tensors()
    compiled.save(tmp_path / "saved")
    for file in ("compiled.json", "graph.json"):
        text = (tmp_path / "saved" / file).read_text()
        (tmp_path / "saved" / file).write_text(text.replace('"cpu"', '"cuda:999"'))
    loaded = teq_graph.load(tmp_path / "saved", verify=False)
    x = torch.randn(5, 20)
    assert all(map(torch.equal, leaves(loaded(x=x)), leaves(compiled(x=x))))
    assert not any("cuda" in str(node.args) + str(node.kwargs) for node in loaded.graph_module.graph.nodes)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("complex128", "tensors of torch.complex128"),
        ("sparse", "linear.bias is no dense tensor"),
        ("an operator of no module", r"test_saving\.double\.default, .* imported modules"),
        ("a local class", "Local: accepted are classes that a module holds by name"),
        ("a long name", "lm_head: String should have at most 1000 characters"),
    ],
)
def test_what_a_saved_directory_cannot_hold(kind: str, message: str, tmp_path: Path) -> None:
    library = torch.library.Library("test_saving", "FRAGMENT")
    if not hasattr(torch.ops.test_saving, "double"):
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")
        torch.library.register_fake("test_saving::double", torch.empty_like, lib=library)
    Local = NamedTuple("Local", [("x", Tensor)])  # noqa: UP014

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(20, 16)
            self.register_buffer("complex", torch.randn(16, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Any:
            result = self.linear(x)
            if kind == "complex128":
                return (result * self.complex).real
            if kind == "an operator of no module":
                return torch.ops.test_saving.double(result)
            return Local(result) if kind == "a local class" else result

    compiled = compile_mlp(Model().eval(), training=None)
    if kind == "a long name":
        compiled.captured.lm_head = "x" * 1001
    if kind == "sparse":
        graph = compiled.graph_module
        graph.get_submodule("linear").bias = torch.eye(16)[0].to_sparse()
    with pytest.raises(ExportError, match=message) as caught:
        compiled.save(tmp_path / "saved")
    in_one_line(caught)
    assert not list(tmp_path.iterdir())
    library._destroy()


IN_A_FRESH_PROCESS = """
import sys, torch, teq_graph
directory, inputs, outputs = sys.argv[1:]
inputs, expected = torch.load(inputs), torch.load(outputs)
result = teq_graph.load(directory)(**inputs)
assert type(result).__name__ == expected["type"]
assert float((result[0] - expected["value"]).abs().max() / expected["value"].abs().max()) <= 1e-6
"""


@pytest.mark.parametrize("name", ["BERT (post-LN)", "Mixture of experts"])
def test_loading_in_a_fresh_process(name: str, tmp_path: Path) -> None:
    """The types of the results, and operators that a library defines, are known only once it is imported."""
    compiled = compile_llama(mixture_of_experts() if name not in BY_NAME else BY_NAME[name].build())
    inputs = {"input_ids": tokens(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    result = compiled(**inputs)
    compiled.save(tmp_path / "saved")
    torch.save(inputs, tmp_path / "inputs.pt")
    torch.save({"type": type(result).__name__, "value": result[0]}, tmp_path / "outputs.pt")
    files = [str(tmp_path / file) for file in ("saved", "inputs.pt", "outputs.pt")]
    root = Path(teq_graph.__file__).parents[1]
    process = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS, *files], cwd=root, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr


def mixture_of_experts() -> nn.Module:
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2)
    return randomize(AutoModelForCausalLM.from_config(config))


def test_a_saved_directory_imports_no_module_of_its_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_mlp().save(tmp_path / "saved")
    (tmp_path / "chosen.py").write_text("raise AssertionError")
    monkeypatch.syspath_prepend(tmp_path)
    description = tmp_path / "saved" / "compiled.json"
    content = json.loads(description.read_text())
    assert content["modules"] == []
    for modules in (["chosen"], ["transformersx.chosen"], [".chosen"]):
        description.write_text(json.dumps({**content, "modules": modules}))
        with pytest.raises(ModelFileError, match=f"{modules[0]}: import it before loading") as caught:
            teq_graph.load(tmp_path / "saved")
        in_one_line(caught)
    description.write_text(json.dumps({**content, "modules": ["transformers.nothing"]}))
    with pytest.raises(ModelFileError, match=r"transformers\.nothing") as caught:
        teq_graph.load(tmp_path / "saved")
    in_one_line(caught)


@pytest.fixture(scope="module")
def saved_with_tokenizer(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = load_model(data_dir / "models" / "stories260K")
    target = tmp_path_factory.mktemp("trained") / "saved"
    return compile_llama(loaded.model, tokenizer=loaded.tokenizer).save(target)


def test_round_trip_of_a_tokenizer(stories260k: Any, saved_with_tokenizer: Path) -> None:
    loaded = teq_graph.load(saved_with_tokenizer)
    text = "Once upon a time"
    assert loaded.tokenizer(text)["input_ids"] == stories260k.tokenizer(text)["input_ids"]


def test_save_keeps_an_existing_directory_unless_told(tmp_path: Path) -> None:
    compiled, target = compile_mlp(), tmp_path / "saved"
    target.mkdir()
    (target / "precious").write_text("mine")
    with pytest.raises(ExportError, match="exists") as caught:
        compiled.save(target)
    in_one_line(caught)
    assert [path.name for path in tmp_path.rglob("*")] == ["saved", "precious"]
    with pytest.raises(ExportError, match="saved holds other files") as caught:
        compiled.save(target, overwrite=True)
    in_one_line(caught)
    assert [path.name for path in tmp_path.rglob("*")] == ["saved", "precious"]
    (target / "precious").unlink()
    for _ in range(2):
        compiled.save(target, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_changed_weights_are_seen_unless_told_not_to_look(tmp_path: Path) -> None:
    target = compile_mlp().save(tmp_path / "saved")
    file = target / TENSORS_FILE
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelFileError, match=r"tensors.safetensors is not what was written: SHA-256 ") as caught:
        teq_graph.load(target)
    in_one_line(caught)
    assert teq_graph.load(target, verify=False)


def test_save_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compile_mlp().save(tmp_path / "saved")
    assert not caplog.records


def test_save_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written") as caught:
        compile_mlp().save(tmp_path / "file" / "saved")
    in_one_line(caught)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_save_into_a_protected_directory(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ExportError, match="cannot be written") as caught:
        compile_mlp().save(tmp_path / "locked" / "saved")
    in_one_line(caught)


@pytest.mark.parametrize("function", ["safetensors.torch.save_file", "pathlib.Path.write_text"])
def test_a_full_disk_leaves_nothing_behind(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        path = next(arg for arg in args if isinstance(arg, Path))
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    compiled = compile_mlp()
    monkeypatch.setattr(function, fail)
    with pytest.raises(ExportError, match="No space left on device") as caught:
        compiled.save(tmp_path / "saved")
    in_one_line(caught)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["graph.json", "tensors.safetensors"])
def test_a_disk_that_fills_up_leaves_nothing_behind(
    file: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A file-size limit of the process stands for the full disk: the writers themselves meet the real error."""
    resource, signal = pytest.importorskip("resource"), pytest.importorskip("signal")
    model = randomize(nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 8)))
    compiled = compile_mlp(model, training=None)
    sizes = {path.name: path.stat().st_size for path in compiled.save(tmp_path_factory.mktemp("whole") / "s").iterdir()}
    assert sizes["graph.json"] < sizes["tensors.safetensors"]
    limit = sizes[file] - 1
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        with pytest.raises(ExportError, match=r"cannot be written: .*too large") as caught:
            compiled.save(tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    in_one_line(caught)
    assert not list(tmp_path.iterdir())


def damaged(directory: Path, kind: str) -> None:
    """Do to a saved directory what `kind` says."""
    names = {"tensors": "tensors.safetensors", "graph": "graph.json", "description": "compiled.json"}
    which, _, how = kind.partition(": ")
    file = directory / names.get(which, "report.json")
    old = file.read_bytes()
    content = json.loads(old) if how.startswith("JSON ") else {}
    if how == "truncated":
        file.write_bytes(old[: len(old) // 2])
    elif how == "flipped bytes":
        file.write_bytes(old[: len(old) // 2] + os.urandom(64) + old[len(old) // 2 + 64 :])
    elif how == "missing":
        file.unlink()
    elif how == "a folder":
        file.unlink()
        file.mkdir()
    elif how.startswith("JSON without "):
        del content[how.split()[-1]]
        file.write_text(json.dumps(content))
    elif how.startswith("JSON with "):
        file.write_text(json.dumps({**content, **json.loads(how.removeprefix("JSON with "))}))
    else:
        file.write_text(OTHER_CONTENT[how])


OTHER_CONTENT = {
    "empty": "",
    "text": "neither JSON nor safetensors",
    "nested lists": "[" * 100_000 + "]" * 100_000,
    "nested objects": '{"a":' * 100_000 + "0" + "}" * 100_000,
    "a number": "3",
    "a long number": "9" * 100_000,
    "a list": "[]",
    "an object": "{}",
    "version alone": json.dumps({"format_version": FORMAT_VERSION}),
}


@pytest.mark.parametrize(
    "kind",
    [
        *(f"{f}: {how}" for f in ("graph", "description", "report", "tensors") for how in OTHER_CONTENT),
        *(f"{f}: {how}" for f in ("graph", "description", "report", "tensors") for how in ("truncated", "missing")),
        *(f"{f}: a folder" for f in ("graph", "description", "report", "tensors")),
        *(f"description: JSON without {key}" for key in ("format_version", "lm_head", "decoder", "modules", "device")),
        *("graph: flipped bytes", "graph: JSON without outputs", 'graph: JSON with {"nodes": []}'),
        *('description: JSON with {"format_version": 99}', 'description: JSON with {"more": 1}'),
        *('description: JSON with {"lm_head": 3}', 'description: JSON with {"device": "cpu, not"}'),
    ],
)
def test_damaged_directories_are_refused(kind: str, saved_mlp: Path, tmp_path: Path) -> None:
    shutil.copytree(saved_mlp, tmp_path / "saved")
    damaged(tmp_path / "saved", kind)
    with pytest.raises(ModelFileError, match="saved") as caught:
        teq_graph.load(tmp_path / "saved")
    in_one_line(caught)


@pytest.fixture(scope="module")
def saved_mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_mlp(training=None).save(tmp_path_factory.mktemp("mlp") / "saved")


def test_loading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="missing") as caught:
        teq_graph.load(tmp_path / "nothing")
    assert "nothing" in in_one_line(caught)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_damaged_neighbour(name: str, saved_with_tokenizer: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(saved_with_tokenizer, damaged)
    (damaged / name).write_bytes((damaged / name).read_bytes()[:40])
    with pytest.raises(ModelFileError, match=r"damaged.* cannot be (loaded|read as a compiled model): ") as caught:
        teq_graph.load(damaged)
    in_one_line(caught)
