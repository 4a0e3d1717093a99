"""A small model on disk to run commands on, and commands in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import teq_graph

ROOT = Path(teq_graph.__file__).resolve().parents[1]
LAYERS = 2
POSITIONS = 64
QUICK = ["--group-size", "16", "--steps", "2", "--samples", "4", "--length", "16", "--tokens", "300"]


def save_tokenizer(directory: Path) -> int:
    """A tokenizer over bytes, without merges; returns the size of its vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)
    return len(vocabulary)


def save_tiny_llama(directory: Path) -> Path:
    """A random Llama with a tokenizer."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=save_tokenizer(directory),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).eval().save_pretrained(directory)
    return directory


def start(code: str, *arguments: object, stdout: int = subprocess.PIPE, **environment: str) -> subprocess.Popen[str]:
    """A fresh interpreter, warnings not errors, that imports the package under test."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True)
