"""How good a model is: perplexity, divergence from a reference, tasks of lm-evaluation-harness.

The tasks, which need the package lm-eval, are in `teq_graph.evaluation.tasks`.
"""

from teq_graph.evaluation.text import Divergence, LogitsFn, Perplexity, builtin_text, divergence, perplexity

__all__ = ["Divergence", "LogitsFn", "Perplexity", "builtin_text", "divergence", "perplexity"]
