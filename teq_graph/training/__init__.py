"""Learning the scales."""

from teq_graph.training.trainer import Trainer

__all__ = ["Trainer"]
