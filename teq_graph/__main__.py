"""`python -m teq_graph` is `teq-graph`."""

from teq_graph.cli import main

if __name__ == "__main__":
    main()
