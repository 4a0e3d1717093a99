"""Language models that look back alone and keep no cache: the graph of a whole text becomes a step over one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import TOKENS, VOCAB
from support.compiling import tokens
from support.graphs import randomize, relative_error
from support.onnx import OnnxModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import teq_graph
from teq_graph import QuantizationConfig
from teq_graph.capture import capture
from teq_graph.onnx.runtime import load

IN_FLOAT = QuantizationConfig(skip=("*",))
LENGTH, NEW, WIDTH = 41, 8, 32


class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, mixes: str = "attention", **options: Any) -> None:
        self.mixes = mixes
        super().__init__(**options)
        self.vocab_size, self.max_position_embeddings = VOCAB, 64


class Own(PreTrainedModel, GenerationMixin):
    """A model as one writes it by hand: no cache, no mask."""

    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.place = nn.Embedding(64, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        batch, length = input_ids.shape
        x = self.embed(input_ids) + self.place(torch.arange(length, device=input_ids.device))
        q, k, v = (one.view(batch, length, 4, -1).transpose(1, 2) for one in self.qkv(x).split(WIDTH, -1))
        if self.config.mixes == "running sums":
            mixed = v.cumsum(2) * q
        elif self.config.mixes == "sums beside attention":
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True) + v.cumsum(2)
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.config.mixes == "attention")
        logits = self.head(x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH)).relu())
        return CausalLMOutput(logits=logits)


def own(**options: Any) -> nn.Module:
    return randomize(Own(OwnConfig(**options)))


def openai_gpt() -> nn.Module:
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    config = OpenAIGPTConfig(vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64)
    return randomize(OpenAIGPTLMHeadModel(config))


def xlm(causal: bool = True) -> nn.Module:
    from transformers import XLMConfig, XLMWithLMHeadModel

    sizes = dict(emb_dim=WIDTH, n_layers=1, n_heads=4, max_position_embeddings=64)
    return randomize(XLMWithLMHeadModel(XLMConfig(**TOKENS, **sizes, causal=causal)))


KINDS: dict[str, Callable[[], nn.Module]] = {"causal mask in a table": openai_gpt, "of positions": xlm, "own": own}


@pytest.fixture(scope="module", params=KINDS)
def built(request: pytest.FixtureRequest) -> tuple[nn.Module, teq_graph.CompiledModel]:
    torch.manual_seed(1)
    model = KINDS[request.param]()
    return model, teq_graph.compile(model, quantization=IN_FLOAT, training=None)


@torch.no_grad()
def test_steps_are_one_forward(built: Any) -> None:
    model, compiled = built
    ids = tokens(2, LENGTH)
    expected = model(input_ids=ids).logits
    assert relative_error(compiled(input_ids=ids).logits, expected) <= 1e-5
    past, logits = None, []
    for part in ids.split([5, 1, 1, 3, LENGTH - 10], 1):
        step = compiled(input_ids=part, past_key_values=past)
        past = step.past_key_values
        logits.append(step.logits)
    assert relative_error(torch.cat(logits, 1), expected) <= 1e-5
    assert all([x.shape for x in layer] == [(2, 4, LENGTH, WIDTH // 4)] * 2 for layer in past or ())


@torch.no_grad()
def test_left_padding_shifts_no_positions() -> None:
    model, ids = openai_gpt(), tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :8] = 0
    captured = capture(model)
    args, _ = captured.bind({"input_ids": ids, "attention_mask": mask})
    padded, _ = captured.graph_module(*args)
    assert relative_error(padded[:1, 8:], model(input_ids=ids[:1, 8:]).logits) <= 1e-5
    assert relative_error(padded[1:], model(input_ids=ids[1:]).logits) <= 1e-5


@torch.no_grad()
def test_onnx_and_what_it_generates_are_the_models(built: Any, tmp_path: Path) -> None:
    model, compiled = built
    path = compiled.export_onnx(tmp_path / "onnx", accuracy_level=1)
    session, runtime = OnnxModel(path), load(path)
    for length in (1, 2, LENGTH):
        ids = tokens(2, length)
        assert relative_error(session.step(compiled, ids, None)[0], model(input_ids=ids).logits) <= 1e-4
    prompt = tokens(1, 9)
    text = prompt
    for _ in range(NEW):
        text = torch.cat([text, model(input_ids=text).logits[:, -1:].argmax(-1)], 1)
    written = runtime.generate(prompt[0].tolist(), eos_token_id=[], do_sample=False, max_new_tokens=NEW)
    assert written == text[0, 9:].tolist()


AHEAD = "each token changes what the model gives for those before it"
UNKNOWN = "it attends in a way that no cache is known for"


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: xlm(causal=False), AHEAD),
        (lambda: own(mixes="all tokens"), AHEAD),
        (lambda: own(mixes="running sums"), UNKNOWN),
        (lambda: own(mixes="sums beside attention"), UNKNOWN),
    ],
)
def test_what_has_no_step_says_why(build: Callable[[], nn.Module], reason: str) -> None:
    """The last of them has attention, whose cache alone would be another function than the model's."""
    captured = capture(build())
    assert captured.decoder is None and captured.without_cache == reason
