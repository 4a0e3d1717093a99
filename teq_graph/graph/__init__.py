"""Nodes and tensors of torch.fx graphs, the one vocabulary of op sets, and running stretches of a graph."""
