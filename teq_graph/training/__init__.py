"""Learning scales and choosing codes."""

from teq_graph.training.trainer import FirstBlock, Trainer, TrainingResult

__all__ = ["FirstBlock", "Trainer", "TrainingResult"]
