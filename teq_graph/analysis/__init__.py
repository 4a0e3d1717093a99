"""What the graph proves, without changing it."""
