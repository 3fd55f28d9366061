"""The kit for authors of passes: what a pass is tested with, without a GPU, a process group or the tracer.

- ``plugin``: for pytest, tests written as graph text with RUN and CHECK lines.
- :class:`ProgramBuilder` and :func:`trainable`: programs in a few lines of Python.
- :func:`nodes`: find nodes and count them.
- :func:`check_mutations`: breaks what a pass made, and fails if the pass's tests do not notice; also
  ``pytest --graphshard-mutate`` for ``.graph`` tests.
- ``graphshard.testing.strategies``: random programs and lists of passes, for hypothesis.
- :func:`apply`, :func:`run_on_ranks`, :func:`assert_same_meaning`: run passes, and programs on all ranks.

docs/writing-a-pass.md shows all of them at work. Nothing else of graphshard imports this package.
"""

from graphshard.testing.breaks import BREAKS, Break
from graphshard.testing.builder import GraphBuilder, ProgramBuilder
from graphshard.testing.matchers import Nodes, nodes
from graphshard.testing.meaning import apply, assert_same_meaning, run_on_ranks
from graphshard.testing.mutation import Mutant, MutantsSurvived, Outcome, check_mutations, mutants
from graphshard.testing.trainable import trainable

__all__ = [
    "BREAKS",
    "Break",
    "GraphBuilder",
    "Mutant",
    "MutantsSurvived",
    "Nodes",
    "Outcome",
    "ProgramBuilder",
    "apply",
    "assert_same_meaning",
    "check_mutations",
    "mutants",
    "nodes",
    "run_on_ranks",
    "trainable",
]
