"""What the JSON files of a saved directory may say. Imported where they are read or written: it loads pydantic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, Field, JsonValue

from teq_graph.capture.schema import Count, Decoder, Encoder, Strict
from teq_graph.errors import ModelFileError, one_line
from teq_graph.saving.names import Attribute, Identifier
from teq_graph.system import files

Size = Annotated[int, Field(ge=0, lt=2**63)]
Text = Annotated[str, Field(max_length=1000)]


class PlaceholderNode(Strict):
    """An input, called `target` where the code takes it apart.

    `sizes` of a tensor's dimensions: a number, or any text where it may vary, equal texts for equal sizes; None where
    it is no tensor.
    """

    op: Literal["placeholder"] = "placeholder"
    name: Identifier
    target: Identifier
    sizes: list[Size | Text] | None


class TensorNode(Strict):
    """A weight or constant: `tensor` of the tensors' file, under the name `target`. `order` is that of its dimensions
    in the file, where it is another."""

    op: Literal["get_attr"] = "get_attr"
    name: Identifier
    target: Attribute
    tensor: Text
    order: list[Size] | None = None


class CallNode(Strict):
    """A call of what `teq_graph.saving.targets` knows; arguments as `teq_graph.saving.arguments` writes them."""

    op: Literal["call_function"] = "call_function"
    name: Identifier
    target: Text
    args: list[JsonValue]
    kwargs: dict[Identifier, JsonValue] = Field(default_factory=dict)


class OutputNode(Strict):
    """The leaves of the result."""

    op: Literal["output"] = "output"
    name: Identifier
    value: JsonValue


Node = Annotated[PlaceholderNode | TensorNode | CallNode | OutputNode, Field(discriminator="op")]


class Tree(Strict):
    """The structure of inputs or results; a leaf is None.

    `keys` are those of mappings; `type` is that of a named tuple or of another class, as `module:name`, `context` what
    the latter keeps beside its children.
    """

    kind: Literal["tuple", "list", "dict", "OrderedDict", "deque", "namedtuple", "class"]
    children: list[Tree | None]
    keys: list[str | int | bool] | None = None
    type: Text | None = None
    context: JsonValue = None


class Scaled(Strict):
    """A `ScaledTensor`: its name, and which tensor of the tensors' file is its index."""

    name: Text
    index: Text


class Site(Strict):
    """An `Equivalence`; `scale` is a tensor of the tensors' file."""

    producer: Text
    kind: Literal["linear", "experts", "convolution", "layer_norm", "rms_norm", "gain"]
    channels: Count
    divided: list[Scaled]
    multiplied: list[Scaled]
    scale: Text | None


class Graph(Strict):
    """The file of the graph: the arguments of its `forward`; the structures of what it takes, `(args, kwargs)`, and
    gives; its nodes in order; the leaves of the inputs that the model was captured with; the equivalences."""

    arguments: list[Identifier]
    inputs: Tree
    outputs: Tree | None
    nodes: list[Node]
    example: list[JsonValue]
    equivalences: list[Site]


class EncoderDecoder(Strict):
    """An `EncoderDecoderShape`."""

    encoder: Encoder
    decoder: Decoder
    decoder_start_token_id: Annotated[int, Field(ge=0, lt=2**31)] | None


class Description(Strict):
    """The description of the directory. `modules` define types and operators of the graph; `device` is where the
    tensors were; `files` are sizes and checksums; of `provenance` nothing is computed."""

    format_version: int
    decoder: Decoder | None
    encoder_decoder: EncoderDecoder | None = None
    lm_head: Text | None
    modules: list[Text]
    device: Text
    files: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None


Content = TypeVar("Content", bound=BaseModel)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ModelFileError where it is none that is accepted, OSError where it cannot be
    read."""
    try:
        return files.read_json(path)
    except ValueError as error:
        raise ModelFileError(f"{path} is no JSON that is accepted: {one_line(error)}") from error


def validated(kind: type[Content], data: Any, path: Path) -> Content:
    """`data` of `path` as `kind`. Raises ModelFileError, which names the first place that is wrong."""
    try:
        return kind.model_validate(data)
    except pydantic.ValidationError as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: pydantic.ValidationError) -> ModelFileError:
    """A refusal of `path` that names the first place that is wrong, and what stands there."""
    return ModelFileError(f"{path} is damaged: {first_fault(error)}")


def first_fault(error: pydantic.ValidationError) -> str:
    """The first place that is wrong, why, and what stands there."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"][:8])
    given = "" if first["type"] == "missing" else f", not {str(first['input'])[:60]!r}"
    return f"{repr(place)[1:-1][:100]}: {repr(first['msg'])[1:-1][:100]}{given}"
