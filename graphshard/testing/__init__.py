"""The kit for authors of passes: what a pass is tested with, without a GPU, a process group or the tracer.

- ``plugin``: for pytest, tests written as graph text with RUN and CHECK lines.
- :class:`ProgramBuilder` and :func:`trainable`: programs in a few lines of Python.
- :func:`nodes`: find nodes and count them.
- :func:`apply`, :func:`run_on_ranks`, :func:`assert_same_meaning`: run passes, and programs on all ranks.

docs/writing-a-pass.md shows all of them at work. Nothing else of graphshard imports this package.
"""

from graphshard.testing.builder import GraphBuilder, ProgramBuilder
from graphshard.testing.matchers import Nodes, nodes
from graphshard.testing.meaning import apply, assert_same_meaning, run_on_ranks
from graphshard.testing.trainable import trainable

__all__ = [
    "GraphBuilder",
    "Nodes",
    "ProgramBuilder",
    "apply",
    "assert_same_meaning",
    "nodes",
    "run_on_ranks",
    "trainable",
]
