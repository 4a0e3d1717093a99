"""A saved directory: descriptions in JSON and tensors in safetensors, which can hold nothing but a graph.

Reading one runs nothing of it: what a graph calls is looked up in `targets`, what fx writes into the source of a graph
has the form that `names` asks for, and `schema` says all that the JSON may hold.
"""

from teq_graph.system.directories import SAVED

FORMAT_VERSION = 4
DESCRIPTION_FILE, GRAPH_FILE, TENSORS_FILE = SAVED, "graph.json", "tensors.safetensors"
