"""Ordinary Hugging Face directories: of a transformed float model, and of codes in the formats of other packages.

Each has, beside what `save_pretrained` writes, a `checkpoint.json`: what it is, where it comes from, and its files.
"""

FORMATS = ("gptq", "compressed-tensors")
"""Of codes, by the names that transformers has for them."""

FORMAT_VERSION = 1
