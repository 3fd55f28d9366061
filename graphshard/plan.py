"""The plan: how a model is spread over ranks, as a frozen value with a shell-safe spelling.

Tokens are joined by ``+``; options follow a colon as ``key=value`` joined by commas; list values are joined by ``/``::

    dp4   zero3:size=4,budget_gb=0.5   pp4:schedule=1f1b,microbatches=8,stages=h.4/h.8/h.12   accum8   batch_dims:1=none
    bf16   fp16:reduce=fp16   recompute:policy=full   offload:optimizer=nvme,path=/scratch   memory:budget_gb=12
    cudagraphs

A size left out (``dp``, ``zero3``, ``pp``) is inferred from the number of ranks.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from graphshard.errors import PlanFieldError, PlanNotSupported, PlanSizeError, PlanSyntaxError
from graphshard.mesh import Mesh
from graphshard.plan_options import (
    TOKENS,
    Memory,
    Offload,
    Precision,
    Recompute,
    convert,
    number,
    option_names,
    spelling,
)

SCHEDULES = ("1f1b", "gpipe", "zb-h1", "zb-h2")
"""Pipeline schedules by name, the default first."""

_GB = 10**9
_ONCE = "zero1 gathers and reduces once a step anyway"
_NOT_YET = ("tp",)
_OPTIONS = {  # of tokens with options from a fixed set
    "dp": (),
    "zero1": ("size", "budget_gb"),
    "zero2": ("size", "budget_gb"),
    "zero3": ("size", "budget_gb"),
    "pp": ("schedule", "microbatches", "stages", "virtual"),
    "accum": (),
    "cudagraphs": (),
    **{token: option_names(token) for token in TOKENS},
}
_PATH = re.compile(r"[\w.\-]+")
_SIZED = re.compile(r"(dp|pp|accum|tp)([0-9]*)")


@dataclass(frozen=True)
class Plan:
    """How a model is spread over ranks. ``Plan()`` is one rank; ``Plan.parse`` and ``str`` are inverses.

    Raises:
        PlanFieldError: a field has a value that no plan string could say.
    """

    dp: int | None = 1  # replicas (of the sharded group, with ZeRO); None: as many as the ranks allow
    zero_stage: int = 0  # 0: plain data parallelism
    shard: int | None = None  # ranks that ZeRO shards over; None: as many as the ranks allow
    budget_gb: float | None = None  # 10^9 bytes per rank that gathers kept or hoisted may take; None: gather twice
    pp: int | None = 1  # pipeline stages; None: as many as the ranks allow
    schedule: str = SCHEDULES[0]
    microbatches: int | None = None  # through the pipeline per round of accumulation; None: twice the stages
    stages: tuple[str, ...] = ()  # module paths where stages 1, 2, … begin; or, one more, where each stage does
    accum: int = 1  # rounds of accumulation per step
    batch_dims: tuple[tuple[int, int | None], ...] = ()  # (index of a flattened argument, dim to split; None: repeat)
    precision: Precision | None = None  # None: as the model has it
    recompute: Recompute | None = None  # None: everything the backward reads is kept
    offload: Offload | None = None  # None: everything stays on the device
    memory: Memory | None = None  # None: no budget
    cudagraphs: bool = False  # on a CUDA device, segments are captured as CUDA graphs; elsewhere it has no effect

    def __post_init__(self) -> None:
        for name in ("dp", "shard", "pp", "microbatches", "accum"):
            value = getattr(self, name)
            if value is None and name != "accum":
                continue
            if not isinstance(value, int) or value < 1:
                raise PlanFieldError(name, value, "an integer of at least 1")
        if not isinstance(self.cudagraphs, bool):
            raise PlanFieldError("cudagraphs", self.cudagraphs, "True or False")
        if self.zero_stage not in (0, 1, 2, 3):
            raise PlanFieldError("zero_stage", self.zero_stage, "0, 1, 2 or 3")
        if self.budget_gb is not None and not (math.isfinite(self.budget_gb) and self.budget_gb >= 0):
            raise PlanFieldError("budget_gb", self.budget_gb, "a number of at least 0")
        for name in ("shard", "budget_gb"):
            if not self.zero_stage and getattr(self, name) is not None:
                raise PlanFieldError(name, getattr(self, name), "None, since zero_stage is 0")
        if self.zero_stage == 1 and self.budget_gb is not None:
            raise PlanFieldError("budget_gb", self.budget_gb, f"None, since {_ONCE}")
        if self.schedule not in SCHEDULES:
            raise PlanFieldError("schedule", self.schedule, " or ".join(map(repr, SCHEDULES)))
        if not all(_PATH.fullmatch(path) for path in self.stages):
            raise PlanFieldError("stages", self.stages, "module paths")
        if self.stages and (self.pp is None or len(self.stages) not in (self.pp - 1, self.pp)):
            expected = "(), since pp is None" if self.pp is None else _stages_expected(self.pp)
            raise PlanFieldError("stages", self.stages, expected)
        if len(set(self.stages)) != len(self.stages):
            raise PlanFieldError("stages", self.stages, "each module path once")
        for name, kind in TOKENS.values():
            if not isinstance(getattr(self, name), kind | None):
                raise PlanFieldError(name, getattr(self, name), f"None or graphshard.plan_options.{kind.__name__}")
        if self.memory is not None and self.recompute is not None and self.recompute.budget_gb is not None:
            raise PlanFieldError("recompute", self.recompute.policy, "another policy than auto: memory has the budget")
        paths = {given.path for given in (self.offload, self.memory) if given is not None and given.path is not None}
        if len(paths) > 1 and self.memory is not None:
            raise PlanFieldError("memory", self.memory.path, "the path of offload: a rank has one file")
        indices = [index for index, _ in self.batch_dims]
        if indices != sorted(set(indices)) or any(n is not None and n < 0 for pair in self.batch_dims for n in pair):
            raise PlanFieldError("batch_dims", self.batch_dims, "pairs (index, dim or None) in order of index")

    @property
    def budget_bytes(self) -> int | None:
        """``budget_gb`` in bytes."""
        return None if self.budget_gb is None else int(self.budget_gb * _GB)

    @property
    def budget_per_rank_bytes(self) -> int | None:
        """What a rank may hold at its peak, by ``memory`` or ``recompute:policy=auto``."""
        asked = self.memory or self.recompute
        return None if asked is None or asked.budget_gb is None else round(asked.budget_gb * _GB)

    @property
    def stage_starts(self) -> tuple[str, ...]:
        """Module paths where stages 1, 2, … begin, ``pp - 1`` of them; empty: the compiler chooses."""
        return self.stages[-((self.pp or 1) - 1) :] if self.stages and self.pp != 1 else ()

    def microbatch_count(self, mesh: Mesh) -> int:
        """Micro-batches a step runs on each data-parallel rank of ``mesh``."""
        pp = mesh.size("pp")
        return self.accum * (self.microbatches or (2 * pp if pp > 1 else 1))

    def mesh(self, world_size: int | None = None) -> Mesh:
        """The mesh for ``world_size`` ranks; for None, every axis gets its stated size, else 2.

        Axes of size 1 are left out. ZeRO shards over ``dp`` unless its groups are replicated (hybrid sharding): then
        ``dp`` counts the replicas and ``shard`` the ranks of a group.

        Raises:
            PlanSizeError: the sizes do not fit; the message names those that would.
        """
        if world_size is None:
            replicas = 1 if self.dp is None and self.shard is not None else self.dp or 2
            sizes = (self.pp or 2, replicas, (self.shard or 2) if self.zero_stage else 1)
        else:
            if len(self._open()) > 1:
                names = " and ".join(self._open())
                raise PlanSizeError(str(self), world_size, f"it leaves the sizes of {names} open: state all but one")
            fitting = self._fit(world_size)
            if fitting is None:
                self._misfit(world_size)
            sizes = fitting
        pp, replicas, shard = sizes
        axes = (pp, replicas, shard) if replicas > 1 and shard > 1 else (pp, replicas * shard, 1)
        return Mesh(tuple((name, size) for name, size in zip(("pp", "dp", "shard"), axes, strict=True) if size > 1))

    def _sizes(self) -> dict[str, int | None]:
        return {"pp": self.pp, "dp": self.dp, "zero": self.shard if self.zero_stage else 1}

    def _open(self) -> list[str]:
        spelling = {"zero": f"zero{self.zero_stage}"}
        return [spelling.get(name, name) for name, size in self._sizes().items() if size is None]

    def _fit(self, world_size: int) -> tuple[int, int, int] | None:
        """(stages, replicas, ranks per sharded group) on ``world_size`` ranks; None if there is no such triple."""
        sizes = self._sizes()
        stated = math.prod(size or 1 for size in sizes.values())
        rest, remainder = divmod(world_size, stated)
        if remainder or not rest or (rest > 1 and not self._open()):
            return None
        pp, replicas, shard = (rest if size is None else size for size in sizes.values())
        if self.zero_stage and shard == 1 and replicas > 1:
            return None  # replicas of groups of one rank shard nothing
        return pp, replicas, shard

    def _misfit(self, world_size: int) -> NoReturn:
        base = math.prod(size or 1 for size in self._sizes().values())
        near = world_size // base
        fits = [n * base for n in range(max(near - 2, 1), near + 4) if self._fit(n * base)]
        below, above = [n for n in fits if n < world_size][-1:], [n for n in fits if n > world_size][:2]
        more = ["…"] if self._open() and above else []
        right = [f"it fits {_alternatives([*map(str, below + above), *more])}"] if fits else []
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        for name, size in (("pp", self.pp), ("dp", self.dp), ("shard", self.shard)):
            if size is None or (name == "pp" and (size == 1 or self.stages)):
                continue
            others = [n for n in divisors if self._with(name, n)._fit(world_size)]
            if others:
                spelling = f"zero{self.zero_stage}:size" if name == "shard" else name
                right.append(f"on {world_size} ranks {spelling} may be {_alternatives(list(map(str, others)))}")
        raise PlanSizeError(str(self), world_size, "; ".join(right))

    def _with(self, name: str, size: int) -> Plan:
        change: dict[str, Any] = {name: size}
        return replace(self, **change)

    def __str__(self) -> str:
        zero = _options(size=self.shard, budget_gb=None if self.budget_gb is None else number(self.budget_gb))
        pipeline = _options(
            schedule=None if self.schedule == SCHEDULES[0] else self.schedule,
            microbatches=self.microbatches,
            stages="/".join(self.stages) or None,
        )
        tokens = []
        if self.dp is None and self.shard is None:
            tokens.append("dp")
        elif self.dp is not None and (self.dp != 1 or self.shard is not None):
            tokens.append(f"dp{self.dp}")
        if self.zero_stage:
            tokens.append(f"zero{self.zero_stage}{zero}")
        if self.pp != 1 or pipeline:
            tokens.append(f"pp{self.pp or ''}{pipeline}")
        if self.accum != 1:
            tokens.append(f"accum{self.accum}")
        if self.batch_dims:
            pairs = (f"{index}={'none' if dim is None else dim}" for index, dim in self.batch_dims)
            tokens.append(f"batch_dims:{','.join(pairs)}")
        given = (self.precision, self.recompute, self.offload, self.memory)
        tokens += [spelling(value) for value in given if value is not None]
        tokens += ["cudagraphs"] if self.cudagraphs else []
        return "+".join(tokens) or "dp1"

    @classmethod
    def parse(cls, text: str) -> Plan:
        """The plan that ``text`` spells; tokens may come in any order.

        Raises:
            PlanSyntaxError: a token, option or value is misspelt, repeated or contradicts another; with the column.
            PlanNotSupported: a token or option that the grammar knows and this version cannot do.
        """
        return _Parser(text).plan()


class _Parser:
    """Parses one plan string; columns in errors count from 1."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.fields: dict[str, Any] = {}

    def fail(self, at: int, problem: str) -> NoReturn:
        raise PlanSyntaxError(self.text, at + 1, problem)

    def plan(self) -> Plan:
        if not self.text:
            self.fail(0, "empty plan; one rank is 'dp1'")
        at, seen = 0, dict[str, str]()
        for token in self.text.split("+"):
            kind, digits, rest = self.head(token, at)
            family = "zero" if kind.startswith("zero") else TOKENS[kind][0] if kind in TOKENS else kind
            if family in seen:
                self.fail(at, f"{token!r} contradicts or repeats {seen[family]!r}; keep one of them")
            seen[family] = token
            self.token(kind, digits, rest, at)
            at += len(token) + 1
        if "dp" not in seen and "shard" in self.fields:
            self.fields["dp"] = None  # zero3:size=4 on 8 ranks is two replicas
        try:
            return Plan(**self.fields)
        except PlanFieldError as error:  # tokens that are right one by one
            self.fail(0, f"{error.name}: expected {error.expected}")

    def head(self, token: str, at: int) -> tuple[str, str, str | None]:
        """Kind, size as written, options as written (None without a colon)."""
        name, colon, rest = token.partition(":")
        sized = _SIZED.fullmatch(name)
        kind, digits = (sized[1], sized[2]) if sized else (name, "")
        if kind in _NOT_YET:
            raise PlanNotSupported(self.text, at + 1, token)
        if not name:
            self.fail(at, "a token is missing")
        if name == "fp32":
            self.fail(at, "without bf16 or fp16 a model computes in its own precision; leave 'fp32' out")
        if kind not in _OPTIONS and kind != "batch_dims":
            digits = name[len(name.rstrip("0123456789")) :]
            known = [f"{kind}{digits}" for kind in ("dp", "pp", "accum")] + ["zero1", "zero2", "zero3", "batch_dims"]
            known += ["cudagraphs", *TOKENS, *_NOT_YET]
            self.fail(at, f"unknown token {name!r}; {_nearest(name, known)}")
        return kind, digits, rest if colon else None

    def token(self, kind: str, digits: str, rest: str | None, at: int) -> None:
        size = self.integer(digits, at + len(kind)) if digits else None
        options = at + len(kind) + len(digits) + 1
        if kind == "batch_dims":
            return self.batch_dims(digits, rest, at)
        if kind == "accum" and size is None:
            self.fail(at, "'accum' needs a number, such as accum8")
        if kind in TOKENS:
            return self.value(kind, rest, at, options)
        if kind.startswith("zero"):
            self.fields["zero_stage"] = int(kind[-1])
        elif kind == "cudagraphs":
            self.fields[kind] = True
        else:
            self.fields[kind] = size
        for key, value, column in self.items(rest, options):
            if key not in _OPTIONS[kind]:
                known = _OPTIONS[kind]
                self.fail(column, f"{kind} has no option {key!r}; {_nearest(key, known) if known else 'it takes none'}")
            self.option(key, value, column, column + len(key) + 1)

    def value(self, kind: str, rest: str | None, at: int, options: int) -> None:
        """A token whose options are the fields of one value."""
        name, made = TOKENS[kind]
        given: dict[str, Any] = {"dtype": kind} if made is Precision else {}
        columns: dict[str, int] = {}
        for key, text, column in self.items(rest, options):
            if key not in option_names(kind):
                self.fail(column, f"{kind} has no option {key!r}; {_nearest(key, option_names(kind))}")
            columns[key] = column + len(key) + 1
            try:
                given[key] = convert(kind, key, text)
            except ValueError as error:
                self.fail(columns[key], f"{key} is {error}, not {text!r}")
        try:
            self.fields[name] = made(**given)
        except PlanFieldError as error:
            if error.name not in columns:
                self.fail(at, f"{kind} needs {'' if error.name == kind else f'{error.name}: '}{error.expected}")
            self.fail(columns[error.name], f"{error.name} is {error.expected}")

    def items(self, rest: str | None, at: int) -> list[tuple[str, str, int]]:
        """(key, value, column of the key) of every option."""
        found: list[tuple[str, str, int]] = []
        for item in [] if rest is None else rest.split(","):
            key, equals, value = item.partition("=")
            if not equals or not key or not value:
                self.fail(at, f"expected an option key=value, not {item!r}")
            if key in (known for known, _, _ in found):
                self.fail(at, f"option {key!r} is given twice")
            found.append((key, value, at))
            at += len(item) + 1
        return found

    def option(self, key: str, value: str, at: int, value_at: int) -> None:
        if key == "size":
            self.fields["shard"] = self.integer(value, value_at)
        elif key == "budget_gb":
            try:
                budget = float(value)
            except ValueError:
                budget = math.nan
            if not (math.isfinite(budget) and budget >= 0):
                self.fail(value_at, f"budget_gb is a number of at least 0, not {value!r}")
            if self.fields["zero_stage"] == 1:
                self.fail(at, f"{_ONCE}, so that budget_gb would do nothing; it is for zero2 and zero3")
            self.fields[key] = budget
        elif key == "schedule":
            if value not in SCHEDULES:
                self.fail(value_at, f"unknown schedule {value!r}; {_nearest(value, SCHEDULES)}")
            self.fields[key] = value
        elif key == "microbatches":
            self.fields[key] = self.integer(value, value_at)
        elif key == "stages":
            self.stages(value, value_at)
        else:
            raise PlanNotSupported(self.text, at + 1, f"{key}={value}")

    def stages(self, value: str, at: int) -> None:
        paths, pp = value.split("/"), self.fields["pp"]
        for path in paths:
            if not _PATH.fullmatch(path):
                self.fail(at, f"{path!r} is not a module path")
        if len(set(paths)) != len(paths):
            self.fail(at, "a module path is given twice; two stages cannot begin at one place")
        if isinstance(pp, int) and len(paths) not in (pp - 1, pp):
            self.fail(at, f"pp{pp} takes {_stages_expected(pp)}, not {len(paths)}")
        self.fields["stages"] = tuple(paths)
        self.fields["pp"] = pp or len(paths) + 1

    def batch_dims(self, digits: str, rest: str | None, at: int) -> None:
        if digits or rest is None:
            self.fail(at, "write batch_dims:index=dim, such as batch_dims:1=none")
        pairs: list[tuple[int, int | None]] = []
        for key, value, column in self.items(rest, at + len("batch_dims:")):
            index = self.integer(key, column, least=0)
            if index in (known for known, _ in pairs):
                self.fail(column, f"argument {index} is given twice")
            dim = None if value == "none" else self.integer(value, column + len(key) + 1, least=0, other=" or none")
            pairs.append((index, dim))
        self.fields["batch_dims"] = tuple(sorted(pairs, key=lambda pair: pair[0]))

    def integer(self, text: str, at: int, least: int = 1, other: str = "") -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < least:
            self.fail(at, f"expected an integer of at least {least}{other}, not {text!r}")
        return int(text)


def _stages_expected(pp: int) -> str:
    return f"{pp - 1} module path(s), where stages 1 and later begin, or {pp}" if pp > 1 else "at most one module path"


def _nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.3)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _alternatives(names: list[str]) -> str:
    if len(names) == 1 or names[-1] == "…":
        return ", ".join(names)
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _options(**items: object) -> str:
    given = [f"{key}={value}" for key, value in items.items() if value is not None]
    return ":" + ",".join(given) if given else ""
