"""Where per-channel scales can move without changing the float output: label propagation and its rules."""

from teq_graph.analysis.equivalences.equivalence import Equivalence, ProducerKind, Refusal, ScaledTensor
from teq_graph.analysis.equivalences.find import Findings, find_equivalences

__all__ = ["Equivalence", "Findings", "ProducerKind", "Refusal", "ScaledTensor", "find_equivalences"]
