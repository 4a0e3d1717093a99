"""What a saved graph is made of, part by part: arguments, structures, tensors."""

from __future__ import annotations

import collections
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.compiling import in_one_line
from support.names import stable
from torch.utils import _pytree as pytree

from teq_graph.errors import ExportError, ModelFileError
from teq_graph.saving import arguments, targets, trees
from teq_graph.saving.schema import Tree
from teq_graph.saving.tensors import TensorFile, TensorStore

CPU = torch.device("cpu")


def no_names(kind: str, name: str) -> Any:
    raise ModelFileError(f"{kind} {name}")


def through_json(value: Any) -> Any:
    return arguments.decode(json.loads(json.dumps(arguments.encode(value), allow_nan=False)), no_names)


ARGUMENTS = (
    *(None, True, False, 0, 1, -1, 2**63 - 1, -(2**63), 0.0, -0.0, 1.0, 1e-320, 1.7976931348623157e308),
    *(math.inf, -math.inf, "", 'a "quote"\n', "é", [], (), {}, [1, [2.0, (3, None)]], {"a": {"b": (True,)}}),
    *(slice(None), slice(1, None, 2), torch.float16, torch.uint8, torch.strided, torch.channels_last),
    *(torch.device("cpu"), torch.device("cuda:1"), torch.preserve_format),
)


@pytest.mark.parametrize("value", ARGUMENTS, ids=stable)
def test_arguments_come_back(value: Any) -> None:
    back = through_json(value)
    assert back == value and type(back) is type(value) and repr(back) == repr(value)


def test_floats_come_back_exactly() -> None:
    numbers = torch.randn(1000, dtype=torch.float64).exp().tolist()
    assert through_json(numbers) == numbers
    assert math.isnan(through_json(math.nan))


@pytest.mark.parametrize("value", [2**63, 1 + 2j, {1: 2}, object(), torch.zeros(2), len, b"bytes", {1, 2}])
def test_other_arguments_are_refused(value: Any) -> None:
    with pytest.raises(ExportError, match="cannot be saved") as caught:
        arguments.encode([value])
    in_one_line(caught)


class Point(NamedTuple):
    x: Any
    y: Any


@pytest.mark.parametrize(
    "value",
    [
        0,
        (),
        [1, (2, [3])],
        {"b": 1, "a": [2], 3: 4, True + 5: 6},
        collections.OrderedDict(z=1, a=(2,)),
        collections.deque([1, 2], maxlen=3),
        Point(1, {"k": Point(2, [])}),
        torch.topk(torch.arange(3), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_structures_come_back(value: Any) -> None:
    spec = pytree.tree_structure(value)
    tree = trees.describe(spec)
    data = None if tree is None else Tree.model_validate(json.loads(tree.model_dump_json()))
    assert trees.build(data, {__name__}) == spec


@pytest.mark.parametrize("value", [{(1, 2): 3}, collections.defaultdict(list, a=1), torch.Size([2, 3])], ids=stable)
def test_other_structures_are_refused(value: Any) -> None:
    with pytest.raises(ExportError) as caught:
        trees.describe(pytree.tree_structure(value))
    in_one_line(caught)


def test_classes_of_modules_that_are_not_named_are_refused() -> None:
    tree = trees.describe(pytree.tree_structure(Point(1, 2)))
    with pytest.raises(ModelFileError, match="accepted are classes of named modules"):
        trees.build(tree, ["collections"])


def test_tensors_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    store, matrix = TensorStore(), torch.randn(4, 6)
    assert [store.add("a", matrix), store.add("b", matrix), store.add("c", matrix.clone())] == ["a", "a", "c"]
    key, order = store.add_in_order("d", matrix.t())
    assert (key, order) == ("a", [1, 0])
    assert [store.add("e", torch.empty(0)), store.add("f", torch.empty(0, 2))] == ["e", "f"]
    store.write(tmp_path / "file")
    assert (tmp_path / "file").stat().st_size < 4 * 48 + 500
    file = TensorFile(tmp_path / "file", CPU)
    turned = file.in_order(key, order)
    assert torch.equal(file["a"], matrix) and turned.data_ptr() == file["a"].data_ptr()
    assert turned.shape == (6, 4) and turned.stride() == matrix.t().stride()
    assert file["e"].shape == (0,) and file["f"].shape == (0, 2)


def test_tensors_outlive_their_file(tmp_path: Path) -> None:
    """What is mapped would change with the file, or end the process where it is cut short."""
    store, values = TensorStore(), torch.randn(100_000)
    store.add("a", values)
    store.write(tmp_path / "file")
    read = TensorFile(tmp_path / "file", CPU)["a"]
    (tmp_path / "file").write_bytes(b"")
    assert torch.equal(read, values)


def test_whoever_may_read_the_folder_may_read_the_tensors(tmp_path: Path) -> None:
    """safetensors lets nobody else in by itself."""
    tmp_path.chmod(0o755)
    store = TensorStore()
    store.add("a", torch.zeros(3))
    store.write(tmp_path / "file")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", list(targets.FUNCTIONS))
def test_functions_come_back(name: str) -> None:
    assert targets.name_of(targets.target_of(name, ())) == name


def test_operators_come_back() -> None:
    for operator in (torch.ops.aten.linear.default, torch.ops.aten.sum.dim_IntList, torch.ops.aten.__and__.Tensor):
        assert targets.target_of(targets.name_of(operator), ()) is operator
