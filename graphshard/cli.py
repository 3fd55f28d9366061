"""The command line. Exit status: 0 success, 1 a failed check, 2 bad input, which is one line on stderr."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from graphshard.errors import (
    GraphshardError,
    IllegalProgram,
    MeshMisfit,
    MissingFile,
    NotEquivalent,
    NothingToCompare,
    PassFailed,
    PlanError,
)
from graphshard.mesh import AXES, Mesh
from graphshard.plan import Plan
from graphshard.program import Level, Program
from graphshard.version import __version__

if TYPE_CHECKING:
    from graphshard.diff.difference import Diff

FAILED_CHECK, BAD_INPUT = 1, 2

_MESH = re.compile(r"\s*".join(rf"(?:\b{axis}=[1-9][0-9]*\b)?" for axis in AXES))

_MODEL_HELP = (
    "file.py:factory or package.module:factory, a function without required arguments that returns "
    "(model, example_inputs), (model, example_inputs, loss_fn) or a dict of compile's arguments"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    options = _parser().parse_args(argv)
    try:
        status = int(options.command(options))
        sys.stdout.flush()  # here, where it can be caught, and not when the interpreter ends
        return status
    except BrokenPipeError:  # whoever read our output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (GraphshardError, OSError) as error:
        if options.traceback:
            traceback.print_exc()
        else:
            print(f"graphshard: {_message(error)}", file=sys.stderr)
        return BAD_INPUT


def _message(error: GraphshardError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _run(options: argparse.Namespace) -> int:
    """Start N local ranks of a training script."""
    from graphshard.runtime.launch import launch

    if not Path(options.script).is_file():
        raise MissingFile(options.script, "the training script")
    # With more threads than cores per rank, ranks of one machine slow each other down.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    status, line = launch(options.n, options.script, options.arguments)
    if line:
        print(f"graphshard run: {line}", file=sys.stderr)
    return status


def _dump(options: argparse.Namespace) -> int:
    """Write every pass's graph, the plan, the code and a picture of memory."""
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(20, "is no directory to write the dump to", str(output))
    _compile(options, dump_dir=output)
    print(f"wrote {len(list(output.iterdir()))} files and folders to {output}")
    return 0


def _explain(options: argparse.Namespace) -> int:
    """The one-page account of a plan."""
    compiled = _compile(options)
    print(json.dumps(compiled.report(), indent=2) if options.json else compiled.explain().rstrip())
    return 0


def _verify(options: argparse.Namespace) -> int:
    """Check every pass against the program before it, and prove the plan."""
    try:
        _compile(options).verify(options.full_size, options.limit_gb, report=print)
    except (NotEquivalent, IllegalProgram, PassFailed, PlanError) as error:
        print(f"graphshard verify: {error}", file=sys.stderr)
        return FAILED_CHECK
    return 0


def _bisect(options: argparse.Namespace) -> int:
    """Find the first pass that is responsible for a wrong loss, a NaN, too much memory or a failed check."""
    arguments = _arguments(options, executor="none")
    from graphshard.compile import compile as compile_model

    try:
        compiled = compile_model(**arguments)
    except (IllegalProgram, PassFailed) as error:  # says which pass
        print(f"graphshard bisect: {error}", file=sys.stderr)
        return FAILED_CHECK
    for seen in compiled.bisect(options.until, arguments["example_inputs"], options.steps, options.limit_gb):
        print(f"{seen.name:<16} {seen.what}")
        if seen.wrong:
            print(f"graphshard bisect: {seen.blamed}: {seen.wrong}", file=sys.stderr)
            return FAILED_CHECK
    print(f"no pass is responsible: {_NOBODY[options.until]}")
    return 0


_NOBODY = {
    "loss": "the loss is the same after each",
    "nan": "everything is finite after each",
    "memory": "no rank takes more than it may after any",
    "verify": "each keeps the program's meaning",
}


def _diff(options: argparse.Namespace) -> int:
    """What passes changed, node by node, what it costs and which pass did it."""
    from graphshard.diff.files import diff_files, dumped

    first = Path(options.first)
    if first.is_dir():
        paths = dumped(first, options.second)
    elif options.second:
        paths = [first, Path(options.second)]
    else:
        raise NothingToCompare(options.first)
    _show(diff_files(paths), options, " to ".join(path.stem for path in (paths[0], paths[-1])))
    return 0


def _show(found: Diff, options: argparse.Namespace, title: str) -> None:
    """Write ``found`` as the options say: a page, JSON, or text as wide as the terminal."""
    if options.html is not None:
        from graphshard.diff.html import to_html
        from graphshard.files import write_atomic

        write_atomic(options.html, to_html(found, title))
        print(f"wrote {options.html}", file=sys.stderr if options.json else sys.stdout)
    if options.json:
        from graphshard.diff.json import to_json

        print(json.dumps(to_json(found), indent=2))
    if options.html is not None or options.json:
        return
    from rich.console import Console

    from graphshard.diff.columns import SIDE_BY_SIDE_COLUMNS, side_by_side
    from graphshard.diff.plain_text import unified

    console = Console()
    if console.is_terminal and console.width >= SIDE_BY_SIDE_COLUMNS:
        side_by_side(found, console)
    else:
        print(unified(found, color=console.is_terminal and not console.no_color))


def _blame(options: argparse.Namespace) -> int:
    """Which passes touched a node, and where in the model's source it comes from."""
    from graphshard.diff.ancestry import ancestry

    found = ancestry(Path(options.directory), options.node)
    print(json.dumps(dataclasses.asdict(found), indent=2) if options.json else found.render())
    return 0


def _opt(options: argparse.Namespace) -> int:
    """Run passes over graph text and print graph text."""
    from graphshard.pipeline import Context, parse_passes, run_passes

    passes = parse_passes(options.passes)
    if Path(options.file).is_dir():
        raise IsADirectoryError(21, "is a folder; expected a graph, such as 00-capture.graph of a dump", options.file)
    if not Path(options.file).is_file():
        raise MissingFile(options.file, "a graph")
    from graphshard import text

    program = text.read(Path(options.file))
    if options.mesh is not None:
        program.mesh = _remesh(program, options.mesh)
    elif options.world_size is not None:
        program.mesh = _resize(program, options.world_size)
    print(text.to_text(run_passes(program, passes, Context(program.mesh))), end="")
    return 0


def _remesh(program: Program, mesh: Mesh) -> Mesh:
    """``mesh``, if ``program`` can be put on it: the cut fixes the number of stages, sharding everything."""
    fixed = {Level.CAPTURED: (), Level.STAGED: ("pp",), Level.SHARDED: AXES}[program.level]
    if any(mesh.size(axis) != program.mesh.size(axis) for axis in fixed):
        raise MeshMisfit(mesh.world_size, str(program.mesh), f"it is {program.level} already, for {program.mesh}")
    return mesh


def _resize(program: Program, world_size: int) -> Mesh:
    """The program's mesh with as many data-parallel ranks as ``world_size`` allows."""
    mesh = program.mesh
    kept = mesh.world_size // mesh.size("dp")
    if world_size % kept:
        raise MeshMisfit(world_size, str(mesh), f"multiples of {kept} fit")
    sizes = {"pp": mesh.size("pp"), "dp": world_size // kept, "shard": mesh.size("shard"), "tp": mesh.size("tp")}
    return _remesh(program, Mesh(tuple((axis, size) for axis, size in sizes.items() if size > 1)))


def _compile(options: argparse.Namespace, **given: Any) -> Any:
    """Compile MODEL without an executor."""
    arguments = _arguments(options, executor="none", **given)
    from graphshard.compile import compile as compile_model

    return compile_model(**arguments)


def _arguments(options: argparse.Namespace, **given: Any) -> dict[str, Any]:
    """Compile's arguments for MODEL; what the command line says goes before what the factory's dict says."""
    plan = Plan.parse(options.plan) if options.plan is not None else None  # before the slow imports
    from graphshard import factory
    from graphshard.compile import compile as compile_model

    known = inspect.signature(compile_model).parameters
    arguments = factory.load(options.model, known, meta=options.device == "meta") | given
    if plan is not None:
        arguments["plan"] = plan
    if options.world_size is not None:
        arguments["world_size"] = options.world_size
    if options.device not in (None, "meta"):  # a meta model's device is the executor's
        arguments["device"] = options.device
    return arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, not {text!r}")
    return int(text)


def _path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected a name, not ''; the current folder is '.'")
    return text


def _gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of gigabytes above 0, not {text!r}")
    return value


def _device(text: str) -> str:
    try:
        return str(torch.device(text))
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"expected a device such as cpu, cuda or meta, not {text!r}") from error


def _mesh(text: str) -> Mesh:
    if not _MESH.fullmatch(text.strip()):
        raise argparse.ArgumentTypeError(f"expected axes in the order {', '.join(AXES)}, such as 'pp=2 dp=4'")
    return Mesh(tuple((axis, size) for axis, size in Mesh.parse(text).axes if size > 1))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="graphshard", description="Compile a PyTorch model into a distributed training program.")
    parser.add_argument("--version", action="version", version=f"graphshard {__version__}, torch {torch.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, function: Any) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=function.__doc__, description=function.__doc__, allow_abbrev=False)
        added.add_argument("--traceback", action="store_true", help="show where an error was raised")
        added.set_defaults(command=function)
        return added

    run = command("run", _run)
    run.add_argument("-n", type=_count, required=True, metavar="N", help="number of ranks")
    run.add_argument("script", help="a Python file")
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own arguments")

    dump = command("dump", _dump)
    dump.add_argument("-o", "--output", type=_path, required=True, metavar="DIR", help="directory to write to")
    diff = command("diff", _diff)
    diff.add_argument("first", metavar="DIR|A.graph", help="a dump, or a graph")
    diff.add_argument(
        "second",
        metavar="PASS|FROM..TO|B.graph",
        nargs="?",
        default="",
        help="of a dump: a pass, or what lies between two; default: from the capture to the last pass. Else a graph",
    )
    diff.add_argument("--json", action="store_true", help="as JSON on stdout; schema: graphshard/diff/json.py")
    diff.add_argument("--html", type=_path, metavar="FILE", help="write a page with both graphs side by side")

    blame = command("blame", _blame)
    blame.add_argument("directory", metavar="DIR", help="a dump")
    blame.add_argument("node", metavar="NODE", help="a node's name, or GRAPH:NODE, such as zero:mm_3 or epilogue:mul")
    blame.add_argument("--json", action="store_true", help="the account as JSON")

    opt = command("opt", _opt)
    opt.add_argument("file", metavar="FILE.graph")
    opt.add_argument("--passes", required=True, help='such as "normalize;zero:stage=3;bucket"')
    ranks = opt.add_mutually_exclusive_group()
    ranks.add_argument("--world-size", type=_count, metavar="N", help="number of ranks; default: as the file says")
    ranks.add_argument("--mesh", type=_mesh, metavar="AXES", help="all axes, such as 'pp=2 dp=4'")

    explain = command("explain", _explain)
    explain.add_argument("--json", action="store_true", help="the report as JSON")
    check = command("verify", _verify)
    check.add_argument("--full-size", action="store_true", help="run at the model's own sizes, not at smaller ones")
    check.add_argument(
        "--limit-gb",
        type=_gigabytes,
        default=4.0,
        metavar="G",
        help="most memory that all ranks here may take (4)",
    )
    bisect = command("bisect", _bisect)
    bisect.add_argument("--until", required=True, choices=tuple(_NOBODY), help="what goes wrong")
    bisect.add_argument("--steps", type=_count, default=2, metavar="N", help="loss, nan: steps to run (2)")
    bisect.add_argument(
        "--limit-gb",
        type=_gigabytes,
        metavar="G",
        help="memory: what a rank may hold; default: as much as before all passes",
    )
    for added in (dump, explain, check, bisect):
        added.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
        added.add_argument("--plan", metavar="P", help="such as zero3+pp4; default: dp")
        added.add_argument(
            "--world-size", type=_count, metavar="N", help="number of ranks; default: the plan's sizes, else 2"
        )
        added.add_argument("--device", type=_device, metavar="D", help="where it will run; meta: build without storage")
    return parser
