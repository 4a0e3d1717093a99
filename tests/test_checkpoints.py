"""Hugging Face directories for other packages: transformed float models, and codes in their formats."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.architectures import BY_NAME, VOCAB
from support.command_line import QUICK, save_tokenizer
from support.compiling import TRAINING, in_one_line, tokens
from support.graphs import randomize
from torch import Tensor, nn

import teq_graph
from teq_graph import ConfigError, ExportError, InputError, NumericsError, QuantizationConfig, TrainingConfig
from teq_graph.checkpoints import FORMATS
from teq_graph.checkpoints.directory import save_float
from teq_graph.checkpoints.formats import check_linears, check_quantization
from teq_graph.checkpoints.quantized import round_scales, save_codes
from teq_graph.cli import run
from teq_graph.graph.nodes import arguments_of
from teq_graph.graph.tensors import get_tensor
from teq_graph.loading import load_model
from teq_graph.quantization import QuantizedWeight
from teq_graph.system.directories import CHECKPOINT
from teq_graph.system.manifest import verify_files

CHEAP = ["--group-size", "32", *QUICK[2:8]]
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def llama(**options: Any) -> Any:
    """A Llama whose rows and columns are multiples of 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return randomize(LlamaForCausalLM(LlamaConfig(**{**SIZES, **options})))


def weights_of(compiled: teq_graph.CompiledModel) -> dict[str, Tensor]:
    """The dequantized weights in float32, by the names of their modules."""
    found = {}
    for node in compiled.graph_module.graph.nodes:
        if node.target is torch.ops.teq_graph.matmul_nbits.default:
            v = arguments_of(node)
            parts = [
                None if v[name] is None else get_tensor(compiled.graph_module, v[name].target)
                for name in ("b", "scales", "zero_points")
            ]
            weight = QuantizedWeight(*parts, v["N"], v["K"], v["bits"], v["block_size"])  # type: ignore[arg-type]
            found[v["b"].target.removesuffix(".codes")] = weight.dequantize()
    return found


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """int64 [rows, count] of int32 [rows, words]: bit i of a stream is bit i % 32 of word i // 32."""
    places = torch.arange(32)
    stream = ((words.to(torch.int64)[..., None] >> places) & 1).flatten(1)
    values = stream[:, : count * bits].reshape(len(words), count, bits)
    return (values << torch.arange(bits)).sum(-1)


def read_gptq(tensors: Mapping[str, Tensor], name: str, config: Mapping[str, Any]) -> Tensor:
    """float32 [N, K], as the format describes it."""
    bits, scales = config["bits"], tensors[f"{name}.scales"]
    assert scales.dtype == torch.float16
    k, n = len(tensors[f"{name}.g_idx"]), scales.shape[1]
    codes = unpacked(tensors[f"{name}.qweight"].t(), bits, k)
    zero_points = unpacked(tensors[f"{name}.qzeros"], bits, n) + (config["checkpoint_format"] == "gptq")
    group = tensors[f"{name}.g_idx"].long()
    return ((codes.t() - zero_points[group]).float() * scales.float()[group]).t()


def read_compressed(tensors: Mapping[str, Tensor], name: str, config: Mapping[str, Any]) -> Tensor:
    """float32 [N, K], as the format describes it."""
    (group,) = config["config_groups"].values()
    args = group["weights"]
    n, k = tensors[f"{name}.weight_shape"].tolist()
    codes, scales = unpacked(tensors[f"{name}.weight_packed"], args["num_bits"], k), tensors[f"{name}.weight_scale"]
    zero_points = torch.full(scales.shape, 2 ** (args["num_bits"] - 1))
    if not args["symmetric"]:
        zero_points = unpacked(tensors[f"{name}.weight_zero_point"].t(), args["num_bits"], n).t()
    size = k if args["strategy"] == "channel" else args["group_size"]
    group_of = torch.arange(k) // size
    return (codes - zero_points[:, group_of]).float() * scales.float()[:, group_of]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_codes_have_the_same_values_bit_for_bit(bits: int, symmetric: bool, group_size: int, tmp_path: Path) -> None:
    model = llama()
    compiled = teq_graph.compile(model, quantization=QuantizationConfig(bits, group_size, symmetric), training=None)
    round_scales(compiled)
    expected = weights_of(compiled)
    assert len(expected) == 14
    for name, read in (("gptq", read_gptq), ("compressed-tensors", read_compressed)):
        out = save_codes(compiled, model, tmp_path / name, name)
        tensors = load_file(out / "model.safetensors")
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        assert config["quant_method"] == name
        for module, weight in expected.items():
            assert torch.equal(read(tensors, module, config), weight), module
            assert f"{module}.weight" not in tensors
        verify_files(out, CHECKPOINT, list(json.loads((out / CHECKPOINT).read_text(encoding="utf-8"))["files"]))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_transformers_reads_them(name: str, bits: int, symmetric: bool, tmp_path: Path) -> None:
    """With the package of the format, where it is installed."""
    pytest.importorskip({"gptq": "gptqmodel", "compressed-tensors": "compressed_tensors"}[name])
    import transformers

    model = llama()
    compiled = teq_graph.compile(model, quantization=QuantizationConfig(bits, 32, symmetric), training=None)
    round_scales(compiled)
    out = save_codes(compiled, model, tmp_path / "out", name)
    options: dict[str, Any] = {}
    if name == "compressed-tensors":
        # compressed-tensors 0.20 makes no place for packed zero points where weights stay compressed.
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    with warnings.catch_warnings(action="ignore"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(out, **options)
    for module, weight in weights_of(compiled).items():
        linear = loaded.get_submodule(module)
        if name == "gptq":
            assert torch.equal(linear.dequantize_weight().t(), weight.half()), "it computes weights in float16"
        else:
            assert torch.equal(linear.weight, weight)
    if name == "compressed-tensors":
        ids = tokens()
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, compiled(input_ids=ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["Llama (GQA)", "OPT", "Gemma2", "Phi", "BERT (post-LN)", "StableLM"])
def test_what_was_learned_in_float_is_written_too(name: str, tmp_path: Path) -> None:
    """Gains, biases and scaled weights in float; the model of what is written computes what the graph does."""
    architecture = BY_NAME[name]
    model = architecture.build()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    training = TrainingConfig(
        stages=("teq", "clip", "bias", "tune"), steps=4, batch_size=2, samples=4, length=12, learning_rate=0.2
    )
    calibration = [architecture.inputs(2, 9) for _ in range(2)]
    compiled = teq_graph.compile(
        model, calibration=calibration, quantization=QuantizationConfig(group_size=-1), training=training
    )
    out = save_codes(compiled, model, tmp_path / "out", "compressed-tensors")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    tensors = load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    weights = {f"{module}.weight": read_compressed(tensors, module, config) for module in weights_of(compiled)}
    floats = {key: tensor for key, tensor in tensors.items() if ".weight_" not in key}
    changed = [key for key, tensor in floats.items() if key in before and not torch.equal(tensor, before[key])]
    assert changed
    missing = model.load_state_dict({**before, **floats, **weights}, strict=False)
    assert not missing.unexpected_keys
    inputs = architecture.inputs(2, 9)
    with torch.no_grad():
        expected, actual = compiled(**inputs)[0], model(**inputs)[0]
    assert float((actual - expected).abs().max() / expected.abs().max()) <= 1e-4


def test_mixed_bits_are_groups_of_compressed_tensors(tmp_path: Path) -> None:
    model = llama()
    quantization = QuantizationConfig(
        bits=3, group_size=32, overrides={"*.mlp.*": {"bits": 8, "symmetric": True}}, skip=("*.1.self_attn.q_proj.*",)
    )
    compiled = teq_graph.compile(model, quantization=quantization, training=None)
    out = save_codes(compiled, model, tmp_path / "out", "compressed-tensors")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    found = {group["weights"]["num_bits"]: group["targets"] for group in config["config_groups"].values()}
    assert {bits: len(targets) for bits, targets in found.items()} == {3: 7, 8: 6}
    assert config["ignore"] == ["model.layers.1.self_attn.q_proj", "lm_head"]


def refuse(format_: str, quantization: QuantizationConfig, model: Any) -> str:
    def check() -> None:
        check_quantization([format_], quantization)
        check_linears([format_], model, quantization)

    with pytest.raises(ConfigError) as caught:
        check()
    return in_one_line(caught)


@pytest.mark.parametrize(
    ("format_", "options", "said"),
    [
        ("gptq", {"target_bits": 3.0}, "target_bits=3 mixes bits; accepted are the same bits"),
        ("gptq", {"overrides": {"*.mlp.*": {"bits": 8}}}, "W4g32 and W8g32 are mixed"),
        ("gptq", {"skip": ("*q_proj*",)}, "model.layers.0.self_attn.q_proj is left in float; accepted"),
        ("gptq", {"quantize_lm_head": True}, "quantize_lm_head is set; accepted are the linears of blocks"),
        ("gptq", {"group_size": 128}, "has a short group, 64 columns of group_size 128; accepted"),
        ("compressed-tensors", {"group_size": 128}, "has a short group, 64 columns of group_size 128; accepted"),
        ("compressed-tensors", {"quantize_embedding": True}, "quantize_embedding is set; accepted are linears"),
    ],
)
def test_what_a_format_cannot_hold(format_: str, options: dict[str, Any], said: str) -> None:
    assert said in refuse(format_, QuantizationConfig(**{"group_size": 32, **options}), llama())


def test_linears_that_a_format_cannot_hold() -> None:
    tied = llama(tie_word_embeddings=True)
    assert "lm_head is tied" in refuse(
        "compressed-tensors", QuantizationConfig(group_size=32, quantize_lm_head=True), tied
    )
    assert "is a Conv1D of transformers" in refuse("gptq", QuantizationConfig(group_size=-1), BY_NAME["GPT-2"].build())
    small = llama(intermediate_size=80)
    assert "accepted are rows and columns in multiples of 32" in refuse(
        "gptq", QuantizationConfig(group_size=-1), small
    )


def test_saving_refuses_by_itself(tmp_path: Path) -> None:
    model = llama()
    compiled = teq_graph.compile(model, quantization=QuantizationConfig(group_size=32), training=None)
    with pytest.raises(
        ConfigError, match=r"are no torch\.float16 numbers; accepted are those that round_scales"
    ) as caught:
        save_codes(compiled, model, tmp_path / "out", "gptq")
    in_one_line(caught)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("teq_graph.checkpoints.quantized.write_back_all", lambda *_: None)
        with pytest.raises(ExportError, match="it gives other values than the compiled graph") as mixed:
            save_codes(compiled, llama(), tmp_path / "out", "compressed-tensors")
        in_one_line(mixed)
    with pytest.raises(InputError, match="accepted is a model of transformers"):
        save_codes(compiled, nn.Linear(3, 3).eval(), tmp_path / "out", "compressed-tensors")
    for name in FORMATS:
        gpt2 = BY_NAME["GPT-2"].build()
        with pytest.raises(ConfigError, match=r"is no weight of one torch\.nn\.Linear"):
            save_codes(teq_graph.compile(gpt2, training=None), gpt2, tmp_path / "out", name)
    assert not any(tmp_path.iterdir())


def test_scales_outside_of_float16() -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3] *= 1e8
    compiled = teq_graph.compile(model, quantization=QuantizationConfig(group_size=32), training=None)
    before = {key: tensor.clone() for key, tensor in compiled.graph_module.state_dict().items()}
    with pytest.raises(ExportError, match=r"up_proj.scales: .* is outside of torch.float16") as caught:
        round_scales(compiled)
    in_one_line(caught)
    assert all(torch.equal(tensor, before[key]) for key, tensor in compiled.graph_module.state_dict().items())


# ------------------------------------------------------------------------------------------------- transformed models


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dtype", "error"), [(None, 1e-5), ("float16", 5e-3), ("bfloat16", 5e-2)])
def test_a_transformed_model_is_an_ordinary_one(dtype: str | None, error: float, tied: bool, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=tied)
    transformed = teq_graph.transform(model, training=TRAINING, quantization=QuantizationConfig(group_size=32))
    out = save_float(transformed, tmp_path / "out", dtype=dtype)
    tensors = load_file(out / "model.safetensors")
    assert ("lm_head.weight" in tensors) != tied
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype or 'float32'}"}
    assert transformed.dtype == torch.float32
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    loaded = load_model(out)
    assert loaded.stored_dtype == (dtype or "float32")
    assert {*dict(loaded.model.named_parameters())} == {*dict(model.named_parameters())}
    ids = tokens()
    with torch.no_grad():
        expected, actual = model(ids).logits, loaded.model(ids).logits
    assert float((actual - expected).norm() / expected.norm()) <= error


def test_a_transformed_model_outside_of_its_dtype(tmp_path: Path) -> None:
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    with pytest.raises(
        NumericsError, match=r"up_proj.weight: some of its values are outside of float16; accepted"
    ) as e:
        save_float(model, tmp_path / "out", dtype="float16")
    in_one_line(e)
    assert not any(tmp_path.iterdir())


def test_directories_that_are_not_ours_stay(tmp_path: Path) -> None:
    model = llama()
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    for overwrite, said in ((False, "exists"), (True, "holds other files")):
        with pytest.raises(ExportError, match=said):
            save_float(model, tmp_path, overwrite=overwrite)
    out = save_float(model, tmp_path / "out")
    save_float(model, out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "out"]


def test_no_equivalence_no_transformation() -> None:
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 8)).eval()
    with pytest.raises(ConfigError, match="Sequential: it has no equivalence, so there is no scale to train") as caught:
        teq_graph.transform(model, (torch.randn(5, 20),))
    in_one_line(caught)
    with pytest.raises(ConfigError, match="skip leaves no weight") as skipped:
        teq_graph.transform(llama(), quantization=QuantizationConfig(skip=("*",)))
    in_one_line(skipped)


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bfloat16 with a tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    model = llama(vocab_size=save_tokenizer(directory), bos_token_id=0, eos_token_id=1)
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def test_transform_on_the_command_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(["transform", str(tiny), "-o", str(out), *CHEAP, "--bits", "3", "--init", "activation"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^equivalences +9 found, 8 trained, \d folded in", printed, re.MULTILINE)
    assert re.search(r"^written +bfloat16, an ordinary Hugging Face directory$", printed, re.MULTILINE)
    original, loaded = load_model(tiny), load_model(out)
    assert loaded.stored_dtype == "bfloat16" and loaded.tokenizer is not None
    changed = [
        name
        for name, parameter in loaded.model.named_parameters()
        if not torch.equal(parameter, original.model.get_parameter(name))
    ]
    assert len(changed) >= 4
    ids = torch.randint(2, 200, (2, 9))
    with torch.no_grad():
        expected, actual = original.model(ids).logits, loaded.model(ids).logits
    assert 0 < float((actual - expected).norm() / expected.norm()) <= 5e-2
    assert run(["transform", str(out), "-o", str(out), *CHEAP, "--overwrite", "--json", "--dtype", "float16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["dtype"], found["equivalences"], found["trained"]) == ("float16", 9, 8)
    described = json.loads((out / CHECKPOINT).read_text(encoding="utf-8"))
    assert described["format"] == "float" and described["provenance"]["stages"] == ["teq"]


def test_formats_on_the_command_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    formats = [part for name in FORMATS for part in ("--format", name)]
    options = ["quantize", str(tiny), "-o", str(out), *CHEAP, "--bits", "3", "--no-evaluate", *formats]
    assert run(options) == 0
    printed = capsys.readouterr().out
    assert all(re.search(f"^{name} +.*{name}, for transformers$", printed, re.MULTILINE) for name in FORMATS)
    weights = []
    for name, read in zip(FORMATS, (read_gptq, read_compressed), strict=True):
        tensors = load_file(out / name / "model.safetensors")
        config = json.loads((out / name / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        weights.append(read(tensors, "model.layers.1.mlp.down_proj", config))
    assert torch.equal(*weights)
    assert run([*options, "--overwrite"]) == 0, "what stands in OUT is all ours"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["transform", "--bits", "5"], "bits=5: accepted are"),
        (["transform", "--dtype", "int8"], "--dtype int8: accepted are float32, float16, bfloat16"),
        (["transform", "--calibration", "nothing.txt"], "--calibration 'nothing.txt': no such file"),
        (["transform", "--skip", "*"], "skip leaves no weight to quantize"),
        (["quantize", "--format", "awq"], "--format awq: accepted are gptq, compressed-tensors"),
        (["quantize", "--format", "gptq", "--target-bits", "3"], "format gptq: target_bits=3 mixes bits"),
        (["quantize", "--format", "compressed-tensors", "--group-size", "128"], "has a short group, 64 columns"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(
    options: list[str], said: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *rest = options
    assert run([command, str(tiny), "-o", str(tmp_path / "out"), *rest]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
    assert not any(tmp_path.iterdir())
