"""Our quantization beside other packages': one model, one set of calibration and of test tokens, one run.

    python tools/compare_peers.py smollm2 --test wiki.test.raw --calibration wiki.valid.raw --bits 3 --output peers

Every method is a process of its own, and every package has a virtual environment of its own below --venvs, made once
from `peers/requirements/`. A method quantizes all linears but the vocabulary projection and leaves dequantized
weights; the same evaluator measures them all: a causal language model by its predictions, any other by the embeddings
of sentences. Writes compare.md, compare.json, compare.png (if matplotlib is
installed) and logs/ in --output. Methods, in the order of the table:

    {methods}
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from peers import table
from peers.methods import METHODS
from peers.process import measure_method

from teq_graph.calibration import TokenInputs, make_batches
from teq_graph.capture import usable_device
from teq_graph.config import BITS, GROUP_SIZES
from teq_graph.errors import InputError, TeqGraphError
from teq_graph.loading import load_model, quiet_transformers
from teq_graph.system import interruption

SHARED_FIELDS = ("bits", "group_size", "iters", "batch_size", "seed", "context", "device")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    description = (__doc__ or "").format(methods=" ".join(METHODS))
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("model", help="hub id, Hugging Face directory, .gguf file, or smollm2")
    parser.add_argument("--test", type=_file, required=True, help="text to measure on")
    parser.add_argument("--calibration", type=_file, required=True, help="another text, to calibrate and train on")
    parser.add_argument("--output", type=Path, required=True, help="folder that takes the results")
    parser.add_argument("--bits", type=int, choices=BITS, default=4)
    parser.add_argument("--group-size", type=int, choices=[size for size in GROUP_SIZES if size > 0], default=128)
    parser.add_argument("--tokens", type=_at_least(2), default=16 * 512, help="of the test text")
    parser.add_argument("--context", type=_at_least(2), default=512, help="tokens of a window")
    parser.add_argument("--samples", type=_at_least(1), default=64, help="calibration windows")
    parser.add_argument("--length", type=_at_least(2), default=256, help="tokens of a calibration window")
    parser.add_argument("--iters", type=_at_least(1), default=50, help="optimizer steps, per block or of the model")
    parser.add_argument("--batch-size", type=_at_least(1), default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=_device, default="cpu", help="of auto-round and of ours: cpu, cuda, or cuda:1")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--timeout", type=_at_least(1), default=4 * 3600, help="seconds that a method may take")
    parser.add_argument("--venvs", type=Path, default=cache / "teq_graph" / "peers", help="folder of environments")
    parser.add_argument("--resume", action="store_true", help="keep rows that compare.json has without an error")
    return parser.parse_args(arguments)


def _device(text: str) -> str:
    try:
        return str(usable_device(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is no file")
    return Path(text)


def _at_least(smallest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text!r}: accepted are integers >= {smallest}")
        return int(text)

    return parse


def prepare(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Save model and tokens into `folder`: fields of the job files, settings of the table, whether rows are ragged."""
    loaded = load_model(args.model)
    model, tokenizer = loaded.model.float(), loaded.tokenizer
    head = model.get_output_embeddings()
    is_encoder = head is None
    sizes = {m.in_features for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head}
    if not sizes:
        raise InputError(f"{args.model}: it has no torch.nn.Linear but the vocabulary projection")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and args.context > positions:
        raise InputError(f"--context {args.context}: {args.model} has {positions} positions")
    text = args.test.read_text(encoding="utf-8")
    if is_encoder:
        test: Any = sentences_of(text, tokenizer, args.tokens, args.context)
        tokens = sum(map(len, test))
    else:
        test = tokenizer(text, verbose=False)["input_ids"][: args.tokens]
        tokens = len(test)
    if len(test) < 2:
        raise InputError(f"{args.test}: accepted are two or more {'sentences' if is_encoder else 'tokens'}")
    batches = make_batches(
        args.calibration,
        samples=args.samples,
        length=args.length,
        batch_size=args.batch_size,
        seed=args.seed,
        tokenizer=tokenizer,
        tokens=TokenInputs(model.get_input_embeddings().num_embeddings, positions),
    )
    calibration = torch.cat([batch["input_ids"] for batch in batches]).numpy()
    fields = {**{name: getattr(args, name) for name in SHARED_FIELDS}, "is_encoder": is_encoder}
    settings = {
        "model": args.model,
        "test": args.test.name,
        "calibration": args.calibration.name,
        **fields,
        "tokens": tokens,
        "calibration_shape": list(calibration.shape),
        "digest": hashlib.sha256(json.dumps(test).encode() + calibration.tobytes()).hexdigest(),
    }
    fields["model"] = str(folder / "model")
    with quiet_transformers():
        model.save_pretrained(fields["model"])
        tokenizer.save_pretrained(fields["model"])
    fields["test"], fields["calibration"] = str(folder / "test.json"), str(folder / "calibration.npy")
    Path(fields["test"]).write_text(json.dumps(test), encoding="utf-8")
    np.save(fields["calibration"], calibration)
    return fields, settings, any(size % args.group_size for size in sizes)


def sentences_of(text: str, tokenizer: Any, tokens: int, longest: int) -> list[list[int]]:
    """Token ids of the sentences of running text, not of its headings, until they are `tokens` in all."""
    sentences: list[list[int]] = []
    for match in re.finditer(r"[A-Z][^\n=]{40,}?[.!?](?=\s)", text):
        if sum(map(len, sentences)) >= tokens:
            break
        sentences.append(tokenizer(match[0], truncation=True, max_length=longest)["input_ids"])
    return sentences


def kept_rows(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of an earlier run, by method. Raises InputError where that run had other settings."""
    if not path.is_file():
        return {}
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        other = [key for key in settings if earlier["settings"].get(key) != settings[key]]
        rows = {row["method"]: row for row in earlier["rows"] if row["method"] in METHODS}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{path}: it was not written by this tool") from None
    if other:
        raise InputError(f"{path}: its rows are of other settings ({', '.join(other)}); name another --output")
    return rows


def write(output: Path, settings: dict[str, Any], rows: Iterable[dict[str, Any]]) -> None:
    rows = list(rows)
    (output / "compare.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1), encoding="utf-8")
    (output / "compare.md").write_text(table.document(settings, rows), encoding="utf-8")


def compare(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        fields, settings, ragged = prepare(args, Path(scratch))
        rows = kept_rows(args.output / "compare.json", settings) if args.resume else {}
        args.output.mkdir(parents=True, exist_ok=True)
        columns = table.columns_of(settings)
        print(table.table([], columns), flush=True)
        for name in args.methods:
            if name not in rows or rows[name].get("error"):
                rows[name] = measure_method(
                    name,
                    fields,
                    venvs=args.venvs.absolute(),
                    logs=args.output / "logs",
                    timeout=args.timeout,
                    ragged=ragged,
                )
                rows = {method: rows[method] for method in METHODS if method in rows}
                write(args.output, settings, rows.values())
            print(table.line(rows[name], columns), flush=True)
    write(args.output, settings, rows.values())
    if not table.plot(rows.values(), args.output / "compare.png", settings):
        print("no plot: matplotlib is not installed")


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        compare(args)
    except (TeqGraphError, OSError, UnicodeDecodeError) as error:
        Parser().error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit(interruption.exit_code())


if __name__ == "__main__":
    interruption.install()  # what ends this ends the method that runs, too
    main()
