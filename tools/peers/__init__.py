"""Parts of `compare_peers.py`: a runner per package, and what starts, measures and shows them."""
