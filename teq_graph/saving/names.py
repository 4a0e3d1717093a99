"""Names that fx writes into the Python source of a graph, where a quote or a colon would be code."""

from __future__ import annotations

import keyword
import re
from typing import Annotated

from pydantic import AfterValidator, Field

_ATTRIBUTE = re.compile(r"[\w /:@#=+-]+(\.[\w /:@#=+-]+)*")


def check_identifier(name: str) -> str:
    """`name` where it can be that of a variable; raises ValueError otherwise."""
    if not name.isidentifier() or keyword.iskeyword(name) or name == "self":
        raise ValueError("accepted are names of variables")
    return name


def check_attribute(name: str) -> str:
    """`name` where it is a dotted path of attributes whose parts mean nothing between double quotes; else ValueError.

    Parts that are no identifiers, such as `0`, stand between them in the source.
    """
    if not _ATTRIBUTE.fullmatch(name):
        raise ValueError("accepted are names of attributes, with dots between")
    return name


_Short = Annotated[str, Field(max_length=1000)]
Identifier = Annotated[_Short, AfterValidator(check_identifier)]
Attribute = Annotated[_Short, AfterValidator(check_attribute)]
