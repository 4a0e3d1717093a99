"""The result of a compilation: it runs, moves between devices, is saved, loaded and exported."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from teq_graph.analysis.equivalences.equivalence import Equivalence
from teq_graph.capture import CapturedGraph
from teq_graph.capture.captured import describe
from teq_graph.capture.shapes import DECODER_INPUTS
from teq_graph.config import check_type
from teq_graph.errors import InputError, ModelFileError, TeqGraphError, brief, one_line
from teq_graph.loading import (
    EXTRACTOR_FILE,
    load_feature_extractor,
    load_tokenizer,
    quiet_transformers,
    reason_of,
)
from teq_graph.provenance import provenance as known_provenance
from teq_graph.report import REPORT_FILE, Report
from teq_graph.saving import DESCRIPTION_FILE, GRAPH_FILE, TENSORS_FILE
from teq_graph.system.directories import new_directory
from teq_graph.system.files import write_json
from teq_graph.system.manifest import verify_files
from teq_graph.system.texts import path_of

if TYPE_CHECKING:
    from os import PathLike


class DecoderOutput(NamedTuple):
    """What a step of a language model gives: logits [b, s, vocab] and, of each layer, keys and values."""

    logits: Tensor
    past_key_values: list[tuple[Tensor, Tensor]]


class EncoderDecoderOutput(NamedTuple):
    """What a step of an encoder-decoder gives: logits [b, s, vocab], of each of the decoder's layers keys and values of
    its tokens, and of each the keys and values that it made of the encoder's result."""

    logits: Tensor
    past_key_values: list[tuple[Tensor, Tensor]]
    encoder_key_values: list[tuple[Tensor, Tensor]]


@dataclasses.dataclass(repr=False)
class CompiledModel:
    """A quantized model.

    `equivalences` are the sites with their learned `scale`; `report` says what was done. `tokenizer`, `config`,
    `generation_config` and `feature_extractor` are the Hugging Face model's own, where it had them; they travel along.
    """

    captured: CapturedGraph
    equivalences: tuple[Equivalence, ...]
    report: Report
    tokenizer: Any = None
    config: Any = None
    generation_config: Any = None
    feature_extractor: Any = None

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
        and `past_key_values` (as returned), and returns a `DecoderOutput`. An encoder-decoder takes, by name, its
        encoder's inputs, `decoder_input_ids` and, optionally, `past_key_values`, and returns an `EncoderDecoderOutput`;
        here it encodes anew in each step, where exported it encodes once.
        """
        if len(args) > len(DECODER_INPUTS) and self.captured.decoder is not None:
            raise InputError(f"{len(args)} positional inputs: accepted are {', '.join(DECODER_INPUTS)}")
        if args and kwargs and not self.captured.steps:
            return self._run(args, kwargs)
        if len(args) == 1 and isinstance(args[0], dict):
            inputs: Any = args[0]
        elif self.captured.decoder is not None:
            inputs = dict(zip(DECODER_INPUTS, args, strict=False)) | kwargs
        else:
            inputs = args or kwargs
        result = self._run(*self.captured.bind(inputs))
        if self.captured.encoder_decoder is not None:
            return EncoderDecoderOutput(*result)
        return result if self.captured.decoder is None else DecoderOutput(*result)

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the graph gives; raises InputError where its ops refuse the sizes or values of their inputs."""
        try:
            return self.graph_module(*args, **kwargs)
        except (TeqGraphError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            given, known = (
                ", ".join(describe(leaf) for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))
                for values in ((args, kwargs), (self.captured.example_args, self.captured.example_kwargs))
            )
            raise InputError(f"inputs {given}: {one_line(error)}; accepted is, for example, {known}") from error

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
        provenance: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write `directory/model.onnx` and its neighbours for onnxruntime and onnxruntime-genai.

        An encoder-decoder becomes `encoder_model.onnx` and `decoder_model.onnx`, which onnxruntime runs.

        accuracy_level: MatMulNBits' own: 0 unset, 1 float32, 4 int8 activations. provenance: plain data that goes into
        the description and the model card before what is known. Raises ExportError; nothing is left behind then.
        """
        _check_target(directory, overwrite)
        from teq_graph.onnx.export import export_onnx

        return export_onnx(
            self.captured,
            directory,
            dtype=dtype,
            accuracy_level=accuracy_level,
            tokenizer=self.tokenizer,
            feature_extractor=self.feature_extractor,
            config=self.config,
            generation_config=self.generation_config,
            report=self.report,
            overwrite=overwrite,
            provenance=provenance,
        )

    def save(self, directory: str | PathLike[str], overwrite: bool = False) -> Path:
        """Write the compiled model to `directory`, for `teq_graph.load`; whole or not at all."""
        from teq_graph.saving.directory import describe

        _check_target(directory, overwrite)
        target = Path(directory)
        saved = describe(self.captured, self.equivalences)
        with new_directory(target, overwrite, DESCRIPTION_FILE) as staging:
            saved.write(staging)
            write_json(staging / REPORT_FILE, self.report.to_dict())
            for part in (self.config, self.generation_config, self.tokenizer, self.feature_extractor):
                if part is not None:
                    part.save_pretrained(staging)
            content = {**saved.description, "provenance": known_provenance(self.report, self.config)}
            write_json(staging / DESCRIPTION_FILE, content)
        return target


def load(directory: str | PathLike[str], verify: bool = True) -> CompiledModel:
    """Read what `CompiledModel.save` wrote. Nothing in the directory is run.

    The tensors are on the device that they were saved from, or on the CPU where there is none such. `verify`: compare
    the checksums of graph and tensors, about a second a GB.

    Raises ModelFileError where files are missing or damaged, or a module outside transformers that defines types
    or operators of the graph is not imported.
    """
    import pydantic

    from teq_graph.saving import directory as saved
    from teq_graph.saving.schema import damaged, read_json

    if not isinstance(directory, (str, os.PathLike)):
        raise ModelFileError(f"directory={brief(directory)}: accepted is the path of a directory written by save()")
    try:
        source = path_of(directory)
    except ValueError as error:
        raise ModelFileError(f"directory {brief(directory)}: {error}") from error
    if not source.is_dir():
        raise ModelFileError(f"directory {brief(str(source))} is missing: accepted is one written by save()")
    try:
        description = saved.read_description(source)
        if verify:
            verify_files(source, DESCRIPTION_FILE, (GRAPH_FILE, TENSORS_FILE))
        captured, equivalences = saved.read(source, description)
        report_data = read_json(source / REPORT_FILE)
        try:
            report = Report.from_dict(report_data)
        except pydantic.ValidationError as error:
            raise damaged(source / REPORT_FILE, error) from error
        return CompiledModel(captured, equivalences, report, *_pretrained_parts(source))
    except ModelFileError as error:
        if str(source) in str(error):
            raise
        raise ModelFileError(f"{source} cannot be read as a compiled model: {error}") from error
    except FileNotFoundError as error:
        raise ModelFileError(f"{error.filename} is missing: accepted is a directory written by save()") from None
    except Exception as error:  # of JSON, tensors and whatever ops say to what they are given
        raise ModelFileError(f"{source} cannot be read as a compiled model: {reason_of(error)}") from error


def _check_target(directory: object, overwrite: object) -> None:
    check_type("directory", directory, (str, os.PathLike), "a path")
    # A string such as "no" would count as true, and cost what is there.
    check_type("overwrite", overwrite, bool, "True or False")


def _pretrained_parts(directory: Path) -> tuple[Any, Any, Any, Any]:
    """Tokenizer, config, generation config and feature extractor, where the directory has them."""
    if not (directory / "config.json").exists():
        return None, None, None, None
    from transformers import AutoConfig, GenerationConfig

    with quiet_transformers():
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        generation = None
        if (directory / "generation_config.json").exists():
            generation = GenerationConfig.from_pretrained(directory)
        tokenizer = None
        if (directory / "tokenizer_config.json").exists():
            tokenizer = load_tokenizer(str(directory), str(directory), local_files_only=True)
        extractor = None
        if (directory / EXTRACTOR_FILE).exists():
            extractor = load_feature_extractor(str(directory), str(directory), local_files_only=True)
    return tokenizer, config, generation, extractor
