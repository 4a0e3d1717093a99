"""Causal attention over a KV cache, proven from the graph by what its parts compute, not by how they are written."""

from teq_graph.analysis.attention.heads import Heads, Rotation
from teq_graph.analysis.attention.sites import Attention, AttentionRefusal, Attentions, find_attentions

__all__ = ["Attention", "AttentionRefusal", "Attentions", "Heads", "Rotation", "find_attentions"]
