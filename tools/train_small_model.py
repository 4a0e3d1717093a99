"""Trains a small GPT-NeoX for a few minutes and saves it as a Hugging Face directory.

It is of the kind that TinyStories models and SmolLM2 are not: LayerNorm, biases, one projection for query, key and
value interleaved by head, attention and MLP side by side. The tokenizer is taken from another model's directory.

    python tools/train_small_model.py --text wiki.valid.raw --tokenizer stories260K --output neox
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

CONTEXT = 256


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16, help=f"windows of {CONTEXT} tokens")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_model(tokens: int) -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        vocab_size=tokens,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    return GPTNeoXForCausalLM(config)


def train(model: GPTNeoXForCausalLM, ids: torch.Tensor, steps: int, batch_size: int) -> None:
    """On random windows of `ids` [n]: AdamW, one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    started = time.perf_counter()
    for step in range(1, steps + 1):
        starts = torch.randint(len(ids) - CONTEXT, (batch_size, 1))
        batch = ids[starts + torch.arange(CONTEXT)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    ids = torch.tensor(tokenizer(args.text.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    model = make_model(len(tokenizer))
    train(model, ids, args.steps, args.batch_size)
    model.eval().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
