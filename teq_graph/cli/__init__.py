"""The command line."""

from teq_graph.cli.process import main, run

__all__ = ["main", "run"]
