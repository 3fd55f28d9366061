"""graphshard: a compiler for distributed training.

``graphshard.compile(model, plan="zero3+pp4")`` turns an ordinary PyTorch model into a distributed training program.
"""

from graphshard.check import check
from graphshard.compile import Compiled, compile
from graphshard.errors import GraphshardError
from graphshard.executable import Executable
from graphshard.execution import ExecutionPlan
from graphshard.load import Loaded, load
from graphshard.mesh import Mesh
from graphshard.pipeline import Context, Pass, run_passes
from graphshard.plan import Plan
from graphshard.program import Program
from graphshard.version import __version__

__all__ = [
    "Compiled",
    "Context",
    "Executable",
    "ExecutionPlan",
    "GraphshardError",
    "Loaded",
    "Mesh",
    "Pass",
    "Plan",
    "Program",
    "__version__",
    "check",
    "compile",
    "load",
    "run_passes",
]
