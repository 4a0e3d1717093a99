"""The blocks of a graph as tables: which weights stand in which row, and the equivalences as arcs beside them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from teq_graph.report import BlockReport, Report, SiteReport, WeightReport


@dataclasses.dataclass(frozen=True)
class Row:
    """A weight of a block: `name` within the block; a linear's `weight`; the `site` whose producer it is."""

    name: str
    full_name: str
    weight: WeightReport | None
    site: SiteReport | None


@dataclasses.dataclass(frozen=True)
class Arc:
    """An equivalence from the row of its producer to that of a consumer; `site` numbers it within the block."""

    source: int
    target: int
    site: int


@dataclasses.dataclass(frozen=True)
class BlockTable:
    """One block; `trained` is None where its codes were chosen without it."""

    number: int
    rows: Sequence[Row]
    arcs: Sequence[Arc]
    trained: BlockReport | None
    sites: int


def block_tables(report: Report) -> list[BlockTable]:
    """The blocks of the graph, in order; none where the report does not know them."""
    sites_of: dict[int, list[SiteReport]] = {}
    block_of = depths(report)
    for site in report.sites:
        found = next((block_of[name] for name in site.consumers if name in block_of), None)
        if found is not None:
            sites_of.setdefault(found, []).append(site)
    trained = {block.linears: block for block in report.blocks}
    weights = {weight.name: weight for weight in report.products}
    return [
        _block_table(number, linears, sites_of.get(number, []), trained.get(linears), weights)
        for number, linears in enumerate(report.graph)
    ]


def _block_table(
    number: int,
    linears: Sequence[str],
    sites: Sequence[SiteReport],
    trained: BlockReport | None,
    weights: dict[str, WeightReport],
) -> BlockTable:
    names: list[str] = []
    for linear in dict.fromkeys(linears):
        # What is no linear itself stands before the first that it feeds.
        names += [s.producer for s in sites if linear in s.consumers and s.producer not in (*linears, *names)]
        names.append(linear)
    site_of = {site.producer: site for site in sites}
    prefix = _shared_prefix(names)
    rows = [Row(short(name).removeprefix(prefix), name, weights.get(name), site_of.get(name)) for name in names]
    place = {name: index for index, name in enumerate(names)}
    arcs = [
        Arc(place[site.producer], place[consumer], index)
        for index, site in enumerate(sites)
        for consumer in site.consumers
        if site.producer in place and consumer in place
    ]
    return BlockTable(number, rows, arcs, trained, len(sites))


def depths(report: Report) -> dict[str, int]:
    """Weight -> the first block that reads it."""
    found: dict[str, int] = {}
    for number, linears in enumerate(report.graph):
        for name in linears:
            found.setdefault(name, number)
    return found


def role(name: str, report: Report) -> str:
    """What weights at the same place of different blocks have in common: `layers.•.q_proj`."""
    if len(report.graph) < 2:
        return short(name)
    return re.sub(r"(?<![^.])\d+(?![^.])", "•", short(name))


def short(name: str) -> str:
    """Without the ending that every weight's name has."""
    return name.removesuffix(".weight")


def _shared_prefix(names: Iterable[str]) -> str:
    """The dotted beginning that all have, as in `model.layers.0.`."""
    split = [short(name).split(".")[:-1] for name in names]
    shared = 0
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared += 1
    return "".join(f"{part}." for part in split[0][:shared]) if split else ""
