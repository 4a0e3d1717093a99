"""The result of a compilation: it runs, moves between devices, is saved, loaded and exported."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.fx import GraphModule

from teq_graph import pipeline
from teq_graph.analysis.equivalences.equivalence import Equivalence, ScaledTensor
from teq_graph.capture import CapturedGraph, DecoderShape, adopt
from teq_graph.capture.captured import DECODER_INPUTS
from teq_graph.config import check_type
from teq_graph.errors import InputError, ModelFileError, brief, one_line
from teq_graph.graph.nodes import placeholder_nodes
from teq_graph.graph.tensors import clone_graph, node_tensor, set_tensor
from teq_graph.graph.tracing import without_dispatch_cache
from teq_graph.report import REPORT_FILE, Report
from teq_graph.system.files import new_directory, torch_file, write_json
from teq_graph.system.quiet import quiet
from teq_graph.system.texts import path_of

if TYPE_CHECKING:
    from os import PathLike

FORMAT_VERSION = 2
GRAPH_FILE, EQUIVALENCES_FILE, DESCRIPTION_FILE = "graph.pt2", "equivalences.pt", "compiled.json"


class DecoderOutput(NamedTuple):
    """What a step of a language model gives: logits [b, s, vocab] and, of each layer, keys and values."""

    logits: Tensor
    past_key_values: list[tuple[Tensor, Tensor]]


@dataclasses.dataclass(repr=False)
class CompiledModel:
    """A quantized model.

    `equivalences` are the sites with their learned `scale`; `report` says what was done. `tokenizer`,
    `config` and `generation_config` are the Hugging Face model's own, where it had them; they travel along.
    """

    captured: CapturedGraph
    equivalences: tuple[Equivalence, ...]
    report: Report
    tokenizer: Any = None
    config: Any = None
    generation_config: Any = None

    def __repr__(self) -> str:
        return f"CompiledModel({', '.join([*self._model_names(), self.report.summary()])})"

    def _repr_html_(self) -> str:
        return self.report.to_html(" ".join(["CompiledModel", *self._model_names()]))

    def _model_names(self) -> list[str]:
        """The Hugging Face model's class or else its type, where its config says which."""
        names = getattr(self.config, "architectures", None) or [getattr(self.config, "model_type", None)]
        return [str(name) for name in names[:1] if name]

    @property
    def graph_module(self) -> GraphModule:
        """The quantized graph: printable, exportable, compilable."""
        return self.captured.graph_module

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the quantized graph on what the model takes; returns what the model returns.

        A causal language model takes `input_ids` and, optionally, `attention_mask` (over past and present)
        and `past_key_values` (as returned), and returns a `DecoderOutput`.
        """
        if len(args) > len(DECODER_INPUTS) and self.captured.decoder is not None:
            raise InputError(f"{len(args)} positional inputs: accepted are {', '.join(DECODER_INPUTS)}")
        if args and kwargs and self.captured.decoder is None:
            return self.graph_module(*args, **kwargs)
        if len(args) == 1 and isinstance(args[0], dict):
            inputs: Any = args[0]
        elif self.captured.decoder is not None:
            inputs = dict(zip(DECODER_INPUTS, args, strict=False)) | kwargs
        else:
            inputs = args or kwargs
        bound_args, bound_kwargs = self.captured.bind(inputs)
        result = self.graph_module(*bound_args, **bound_kwargs)
        if self.captured.decoder is None:
            return result
        return DecoderOutput(*result)

    def to(self, device: str | torch.device) -> CompiledModel:
        """Move every tensor, and the graph's own device arguments, to `device`; returns self."""
        self.captured.move_to(device)
        return self

    def export_onnx(
        self,
        directory: str | PathLike[str],
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        accuracy_level: int = 4,
        overwrite: bool = False,
    ) -> Path:
        """Write `directory/model.onnx` and its neighbours for onnxruntime and onnxruntime-genai.

        accuracy_level: MatMulNBits' own: 0 unset, 1 float32, 4 int8 activations. Raises ExportError; nothing
        is left behind then.
        """
        _check_target(directory, overwrite)
        from teq_graph.onnx.export import export_onnx

        return export_onnx(
            self.captured,
            directory,
            dtype=dtype,
            accuracy_level=accuracy_level,
            tokenizer=self.tokenizer,
            config=self.config,
            generation_config=self.generation_config,
            report=self.report,
            overwrite=overwrite,
        )

    def save(self, directory: str | PathLike[str], overwrite: bool = False) -> Path:
        """Write the compiled model to `directory`, for `teq_graph.load`; whole or not at all."""
        _check_target(directory, overwrite)
        target = Path(directory)
        captured = self.captured
        with torch.no_grad(), without_dispatch_cache():
            program = torch.export.export(
                _compact(captured.graph_module),
                captured.example_args,
                captured.example_kwargs,
                dynamic_shapes=captured.dynamic_shapes,
            )
        description = {
            "format_version": FORMAT_VERSION,
            "decoder": captured.decoder and dataclasses.asdict(captured.decoder),
            "lm_head": captured.lm_head,
            "modules": _needed_modules(captured.graph_module),
        }
        equivalences = [
            {
                **{field: getattr(e, field) for field in ("producer", "kind", "channels", "scale")},
                "divided": [(s.name, s.index) for s in e.divided],
                "multiplied": [(s.name, s.index) for s in e.multiplied],
            }
            for e in self.equivalences
        ]
        with new_directory(target, overwrite) as staging:
            with torch_file(staging / GRAPH_FILE) as file:
                torch.export.save(program, file)
            with torch_file(staging / EQUIVALENCES_FILE) as file:
                torch.save(equivalences, file)
            write_json(staging / DESCRIPTION_FILE, description)
            write_json(staging / REPORT_FILE, self.report.to_dict())
            for part in (self.config, self.generation_config, self.tokenizer):
                if part is not None:
                    part.save_pretrained(staging)
        return target


def load(directory: str | PathLike[str]) -> CompiledModel:
    """Read what `CompiledModel.save` wrote.

    Raises ModelFileError where files are missing or damaged, or a module outside transformers that defines types
    or operators of the graph is not imported.
    """
    if not isinstance(directory, (str, os.PathLike)):
        raise ModelFileError(f"directory={brief(directory)}: accepted is the path of a directory written by save()")
    try:
        source = path_of(directory)
    except ValueError as error:
        raise ModelFileError(f"directory {brief(directory)}: {error}") from error
    if not source.is_dir():
        raise ModelFileError(f"directory {brief(str(source))} is missing: accepted is one written by save()")
    try:
        description = json.loads((source / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        version = description.get("format_version")
        if version != FORMAT_VERSION:
            raise ModelFileError(f"{source}: format_version={version!r}, accepted is {FORMAT_VERSION}")
        for module in description.get("modules", ()):
            _import(module, source)
        # Of what it cannot read the exception tells; the warnings are about torch's own buffers.
        with quiet("torch.export", level=logging.CRITICAL):
            program = torch.export.load(source / GRAPH_FILE)
        saved = torch.load(source / EQUIVALENCES_FILE, weights_only=True)
        decoder = description["decoder"]
        if decoder is not None:
            decoder = DecoderShape.from_dict(decoder)
        report = Report.from_dict(json.loads((source / REPORT_FILE).read_text(encoding="utf-8")))
        equivalences = tuple(
            Equivalence(
                **{
                    **entry,
                    "divided": tuple(ScaledTensor(*part) for part in entry["divided"]),
                    "multiplied": tuple(ScaledTensor(*part) for part in entry["multiplied"]),
                }
            )
            for entry in saved
        )
        graph_module = program.module(check_guards=False)
        assert isinstance(graph_module, GraphModule)
        adopt(graph_module)
        tokenizer, config, generation_config = _pretrained_parts(source)
    except ModelFileError:
        raise
    except FileNotFoundError as error:
        raise ModelFileError(f"{error.filename} is missing: accepted is a directory written by save()") from None
    except Exception as error:  # zip, JSON and unpickling errors share no base class
        raise ModelFileError(f"{source} cannot be read as a compiled model: {one_line(error)}") from error
    pipeline.run(pipeline.AFTER_LOADING, graph_module)
    args, kwargs = program.example_inputs or ((), {})
    captured = CapturedGraph(
        graph_module, args, kwargs, _dynamic_shapes(graph_module, args, kwargs), decoder, description["lm_head"]
    )
    return CompiledModel(captured, equivalences, report, tokenizer, config, generation_config)


def _check_target(directory: object, overwrite: object) -> None:
    check_type("directory", directory, (str, os.PathLike), "a path")
    # A string such as "no" would count as true, and cost what is there.
    check_type("overwrite", overwrite, bool, "True or False")


def _compact(graph_module: GraphModule) -> GraphModule:
    """The same graph over tensors that are contiguous and fill their storage: of others torch writes the storage."""
    twin = clone_graph(graph_module)
    for node in twin.graph.nodes:
        if node.op == "get_attr":
            tensor = node_tensor(node)
            if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes:
                set_tensor(twin, node.target, tensor.clone(memory_format=torch.contiguous_format))
    return twin


def _needed_modules(graph_module: GraphModule) -> list[str]:
    """The modules that define the containers of the graph's inputs and outputs, and its operators."""
    modules: set[str] = set()
    info = graph_module.graph._codegen.pytree_info  # type: ignore[attr-defined]
    specs = [info.in_spec, info.out_spec]
    while specs:
        spec = specs.pop()
        specs += spec.children()
        # Of a named tuple, the context is the class.
        modules.update(kind.__module__ for kind in (spec.type, spec.context) if isinstance(kind, type))
    for node in graph_module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and (definition := OPDEFS.get(node.target._schema.name)):
            modules.add(definition._init_fn.__module__)
    return sorted(module for module in modules if module.partition(".")[0] not in ("builtins", "torch", "teq_graph"))


def _import(module: str, source: Path) -> None:
    """Make the types and operators of `module` known. A saved directory cannot run any code that is installed:
    what is not imported yet must be part of transformers."""
    if module in sys.modules:
        return
    if module.partition(".")[0] != "transformers":
        raise ModelFileError(f"{source} has types or operators of {module}: import it before loading")
    importlib.import_module(module)


def _dynamic_shapes(graph_module: GraphModule, args: Any, kwargs: Any) -> Any:
    """What `torch.export` needs to keep every dimension dynamic that is a symbol in the graph."""
    placeholders = iter(placeholder_nodes(graph_module))

    def dims(value: Any) -> Any:
        node = next(placeholders)
        if not isinstance(value, Tensor):
            return None
        sizes = node.meta["val"].shape
        return {d: torch.export.Dim.DYNAMIC for d, size in enumerate(sizes) if not isinstance(size, int)}

    by_args, by_kwargs = torch.utils._pytree.tree_map(dims, (args, kwargs))
    # By name where everything has one, otherwise in the order of the signature.
    return (*by_args, *by_kwargs.values()) if args else by_kwargs


def _pretrained_parts(directory: Path) -> tuple[Any, Any, Any]:
    """Tokenizer, config and generation config, where the directory has them."""
    if not (directory / "config.json").exists():
        return None, None, None
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    config = AutoConfig.from_pretrained(directory)
    generation = None
    if (directory / "generation_config.json").exists():
        generation = GenerationConfig.from_pretrained(directory)
    tokenizer = None
    if (directory / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(directory)
    return tokenizer, config, generation
