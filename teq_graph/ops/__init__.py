"""The torch operators of compiled graphs; importing this package registers them."""

from teq_graph.ops import registration as registration
