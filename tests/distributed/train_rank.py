"""What each process of test_compile_distributed.py runs: a scenario on a plan; prints JSON."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphshard
from distributed.processes import report
from graphshard.errors import GraphshardError, OffloadFailed, PlanMismatch, RanksOutOfStep, ValueLost
from graphshard.execution import type_of
from graphshard.program import info
from graphshard.runtime.groups import leave_world
from graphshard.runtime.neighbours import Neighbours
from graphshard.runtime.nvme import ALIGN
from graphshard.runtime.shared_memory import SharedMemoryCommunicator
from models.zoo import gpt

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
ROWS = 16
LIMIT_S = 10.0 if torch.get_default_device().type == "cpu" else 60.0  # kernels are compiled first, or interpreted


def model(seed: int = 0) -> nn.Module:
    """Six layers with one tied pair of weights, float64."""
    torch.manual_seed(seed)
    widths = ((6, 10), (10, 10), (10, 10), (10, 3))
    layers: list[nn.Module] = []
    for a, b in widths:
        layers += [nn.Linear(a, b), nn.Tanh()]
    made = nn.Sequential(*layers[:-1]).double()
    made[4].weight = made[2].weight
    return made


def batch() -> tuple[Tensor, Tensor]:
    """The global batch."""
    torch.manual_seed(7)
    return torch.randn(ROWS, 6, dtype=torch.float64), torch.randn(ROWS, 3, dtype=torch.float64)


def compiled(plan: str, executor: str, **more: Any) -> graphshard.Compiled:
    """The model compiled for the executor, all ranks of it in this process or one."""
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-2)
    more = {"model": model(), "optimizer": optimizer, "max_grad_norm": 0.5, **more}
    made = more.pop("model")
    return graphshard.compile(
        made, plan, loss_fn=F.mse_loss, executor=executor, world_size=WORLD_SIZE, timeout_s=LIMIT_S, **more
    )


def part(given: graphshard.Executable, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What step is given on this rank."""
    if given.executor == "local":
        return tensors
    return tuple(t.chunk(given.dp_size)[given.dp_rank] for t in tensors)


def listed(state: dict[str, Any]) -> dict[str, Any]:
    """Tensors as lists, for JSON."""
    return {k: listed(v) if isinstance(v, dict) else getattr(v, "tolist", lambda v=v: v)() for k, v in state.items()}


EXECUTORS = ("distributed", "local") if RANK == 0 else ("distributed",)
"""What each rank trains with; what all do goes first, so that nobody waits for what rank 0 does alone."""


def trained(*plans: str) -> dict[str, Any]:
    """Everything the API gives, by executor and plan."""
    return {executor: {plan: train(plan, executor) for plan in plans} for executor in EXECUTORS}


def train(plan: str, executor: str) -> dict[str, Any]:
    """The same of one plan."""
    module = model()
    c = compiled(plan, executor, model=module)
    mine = part(c, batch())
    losses = [c.step(*mine).item() for _ in range(3)]
    evaluated = c.evaluate(*mine).item()
    output = c(*mine[:1])
    saved, saved_state = c.state_dict(), c.optimizer.state_dict()
    rank0_only = c.state_dict(rank0_only=True)
    losses.append(c.step(*mine).item())
    c.load_state_dict(saved)
    c.optimizer.load_state_dict(saved_state)
    again = c.step(*mine).item()
    return {
        "losses": losses,
        "again": again,
        "evaluated": evaluated,
        "output": None if output is None else output.tolist(),
        "state": listed(saved),
        "optimizer": listed(saved_state["state"]),
        "rank0_only": sorted(rank0_only),
        "meta": all(p.is_meta for p in module.parameters()),
        "tied": len(set(map(id, module.parameters()))) < len(list(module.named_parameters(remove_duplicate=False))),
        "dp": [c.dp_rank, c.dp_size],
        "dp_rank_of_mesh": c.mesh.dp_rank(RANK),
        "stage": c.mesh.coordinates(RANK)["pp"],
    }


def meta(plan: str) -> dict[str, Any]:
    """A model on the meta device: refused without values, then given some, there and to others in both ways."""
    with torch.device("meta"):
        first, second, third = model(), model(), model()
    error = ""
    refused = compiled(plan, "distributed", model=first)
    try:
        refused.step(*part(refused, batch()))
    except GraphshardError as caught:
        error = type(caught).__name__
    values = model().state_dict()
    refused.load_state_dict(values)
    loaded = compiled(plan, "distributed", model=second)
    loaded.load_state_dict(values)

    def init(module: nn.Module) -> None:
        module.load_state_dict(values)

    initialised = compiled(plan, "distributed", model=third, init=init)
    local = compiled(plan, "local")
    losses = [[c.step(*part(c, batch())).item() for _ in range(2)] for c in (local, refused, loaded, initialised)]
    for c in (initialised, loaded, refused):
        c.close()
    leave_world()
    return {"error": error, "losses": losses, "threads": [name for name in threads() if "gloo" in name]}


def closed(plan: str) -> dict[str, Any]:
    """The losses of three trainings one after the other, and how many threads and files the process has after each;
    ranks come to its end at different times."""
    found: dict[str, Any] = {"left": [], "losses": []}
    for index in range(3):
        with compiled(plan, "distributed") as c:
            found["losses"].append([c.step(*part(c, batch())).item() for _ in range(2)])
            c.state_dict()
            time.sleep(0.1 * (RANK if index % 2 else WORLD_SIZE - RANK))
        gc.collect()
        found["left"].append([len(threads()), len([*Path("/proc/self/fd").iterdir()])])
    return found


def threads() -> list[str]:
    """The names of those of this process."""
    return [path.read_text(encoding="ascii").strip() for path in Path("/proc/self/task").glob("*/comm")]


def loaded(plan: str, folder: str) -> dict[str, Any]:
    """What rank 0 compiled and dumped, loaded on all ranks."""
    torch.distributed.init_process_group("gloo")
    local = compiled(plan, "local", example_inputs=batch())
    expected = [local.evaluate(*batch()).item()]
    if RANK == 0:
        local.dump(folder)
    torch.distributed.barrier()
    c = graphshard.load(folder, model(), trust_code=True, timeout_s=60.0)
    mine = part(c, batch())
    found = [c.evaluate(*mine).item()]
    for _ in range(3):
        expected.append(local.step(*batch()).item())
        found.append(c.step(*mine).item())
    return {"executor": c.executor, "expected": expected, "found": found}


def large(seed: int = 0) -> nn.Module:
    """Three layers, of which the one in the middle is not trained; large enough for updates in place."""
    torch.manual_seed(seed)
    layers = [nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 512)]
    layers[1].requires_grad_(False)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def in_place(*plans: str) -> dict[str, Any]:
    """Steps, evaluations and loading, by executor and plan; and how many of its parts of parameters a rank had where
    the others read them after each step, and of how many."""
    begin, generator = SharedMemoryCommunicator.all_gather, torch.Generator().manual_seed(RANK)

    def later(self: SharedMemoryCommunicator, axis: str, output: Tensor, source: Tensor) -> Any:
        time.sleep(torch.rand((), generator=generator).item() * 4e-3)
        return begin(self, axis, output, source)

    SharedMemoryCommunicator.all_gather = later  # type: ignore[method-assign]
    torch.manual_seed(3)
    batch = torch.randn(ROWS, 512), torch.randn(ROWS, 512)
    found: dict[str, Any] = {executor: {} for executor in EXECUTORS}
    for executor, plan in itertools.product(EXECUTORS, plans):
        c = compiled(plan, executor, model=large())
        mine, losses, parts = part(c, batch), [], []
        for index in range(6):
            if index == 3:
                c.load_state_dict(large(seed=1).state_dict())
            losses += [c.step(*mine).item(), c.evaluate(*mine).item()]
            parts.append(shared_parts(c))
        weights = c.state_dict()["0.weight"][:4].tolist()
        found[executor][plan] = {"losses": losses, "parts": parts, "weights": weights}
    return found


def behind(plan: str) -> dict[str, Any]:
    """A socket of rank 0's takes no note of two calls, as if its reader were busy, before the rank waits to hear that
    the other one has begun the second."""
    c = compiled(plan, "distributed", example_inputs=batch())
    mine = part(c, batch())[0]
    c(mine)
    flush, serve, waits = Neighbours._flush, SharedMemoryCommunicator.serve_during, itertools.count()

    def serve_during(self: SharedMemoryCommunicator, wait: Callable[[], object]) -> None:
        if next(waits) == 1:
            Neighbours._flush = flush  # type: ignore[method-assign]
            for peer in self._neighbours._peers.values():
                self._neighbours._poll.modify(peer.link, select.POLLIN | select.POLLOUT)
                peer.is_full = True
        serve(self, wait)

    if RANK == 0:
        Neighbours._flush = lambda *_: None  # type: ignore[method-assign]
        SharedMemoryCommunicator.serve_during = serve_during  # type: ignore[method-assign]
    return {"outputs": [None if out is None else out.sum().item() for out in (c(mine), c(mine))]}


def shared_parts(c: graphshard.Compiled) -> tuple[int, int]:
    """How many of the parts of parameters that this rank stores lie in memory that ranks share, and how many there
    are."""
    executor, kept = c._made_executor(), 0
    refs = [ref for ref in executor.stores[RANK] if ref.name.startswith("shard:")]
    for residents in (shared.residents for shared in executor._shared.values()):
        for ref, value in ((ref, executor.stored(RANK, ref)) for ref in refs):
            if residents.holds({ref: WORLD_SIZE * value.nbytes}):
                kept += residents.part(ref, type_of(value)).data_ptr() == value.data_ptr()
    return kept, len(refs)


def mixed(plan: str) -> dict[str, Any]:
    """Steps in less than float32, the second of which overflows in float16 on the first data-parallel rank."""
    found: dict[str, Any] = {}
    x, y = (t.float() for t in batch())
    for executor in EXECUTORS:
        c = compiled(plan, executor, model=model().float())
        losses, scales = [], []
        for index in range(4):
            given = x.clone()
            given[0] *= 1e6 if index == 1 else 1.0
            losses.append(c.step(*part(c, (given, y))).item())
            scales.append(c.optimizer.state_dict().get("scaler"))
        state = c.state_dict()
        dtypes = sorted({str(value.dtype) for value in state.values()})
        found[executor] = {"losses": losses, "scales": scales, "state": listed(state), "dtypes": dtypes}
    return found


def mismatch(plan: str) -> dict[str, Any]:
    """The last rank was given another plan; nobody has begun, so trying again says the same."""
    plan = "dp" if RANK == WORLD_SIZE - 1 else plan
    c = compiled(plan, "distributed")
    with suppress(PlanMismatch):
        c.step(*part(c, batch()))
    c.step(*part(c, batch()))
    return {}


def given_up(plan: str, why: str) -> dict[str, Any]:
    """In the second step the last rank's file ends early, somebody interrupts it, it lacks values since loading failed
    there, or it is given a batch that does not split; what each rank raises then, and what it says to another step and
    to reading."""
    c = compiled(plan, "distributed")
    c.step(*part(c, batch()))
    read, found = os.preadv, {}

    def failing(file: int, buffers: list[memoryview], offset: int) -> int:
        if why == "short read":
            return 0
        os.preadv = read
        signal.raise_signal(signal.SIGINT)  # what waits for this in the main thread
        return read(file, buffers, offset)

    fails = RANK == WORLD_SIZE - 1 and why in ("short read", "interrupt")
    if why == "lost":
        load_failing(c, c.state_dict())
    rows = -1 if RANK == WORLD_SIZE - 1 and why == "batch" else None
    try:
        # A peer that needed nothing more of this rank in that step notices in the next one; and Python loses an
        # interrupt that comes while it calls a finalizer.
        for _ in range(4):
            os.preadv = failing if fails else read  # type: ignore[assignment]
            c.step(*(values[:rows] for values in part(c, batch())))
    except (GraphshardError, KeyboardInterrupt) as error:
        found = {"error": type(error).__name__, "message": str(error)}
    os.preadv = read
    for name, ask in (("step", lambda: c.step(*part(c, batch()))), ("state_dict", c.state_dict)):
        try:
            ask()
        except RanksOutOfStep as error:
            found[name] = str(error)
    if RANK == WORLD_SIZE - 1:
        sys.stdin.read()  # the others learn of it by its alarm, not by its end
    return found


def wide() -> nn.Module:
    """Layers whose state takes several blocks of a disk."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 3)).double()


def load_failing(given: graphshard.Compiled, values: dict[str, Tensor]) -> None:
    """The last rank cannot write the parameters it is given."""
    write = os.pwritev
    if RANK == WORLD_SIZE - 1:
        os.pwritev = lambda *_: 0
    with suppress(OffloadFailed):
        given.load_state_dict(values)
    os.pwritev = write


def refused(plan: str) -> dict[str, Any]:
    """The last rank is given a batch that the model does not take in the first step of all, and in the second one that
    must be compiled anew; what each rank raises, and the losses besides."""
    c, local = compiled(plan, "distributed"), compiled(plan, "local")
    said, losses = [], []
    for index in range(5):
        given = [values[: 8 if index == 3 else None] for values in batch()]
        x, y = part(c, tuple(given))
        if index == 2:
            x, y = x[:4], y[:4]  # new shapes on all ranks
        if RANK == WORLD_SIZE - 1 and index in (0, 2):
            x = x[:, :-1].contiguous()
        try:
            losses.append(c.step(x, y).item())
        except GraphshardError as error:
            said.append(f"{type(error).__name__}: {error}")
            continue
        losses[-1] -= local.step(*given).item()
    return {"said": said, "far": max(map(abs, losses)), "steps": len(losses)}


def not_ready(plan: str) -> dict[str, Any]:
    """The last rank lacks values in the first step; what each rank raises, twice, and the losses once it has them."""
    c, local = compiled(plan, "distributed"), compiled(plan, "local")
    c.evaluate(*part(c, batch()))
    values, said = c.state_dict(), []
    load_failing(c, values)
    for _ in range(2):
        try:
            c.step(*part(c, batch()))
        except GraphshardError as error:
            said.append(f"{type(error).__name__}: {error}")
    c.load_state_dict(values)
    return {"said": said, "losses": [[c.step(*part(c, batch())).item() for _ in range(2)] for c in (local, c)]}


def lost_by_one(plan: str) -> dict[str, Any]:
    """The last rank cannot write the parameters it is given; what each rank says when they are read, twice, and whether
    they are there once all have been given them again."""
    c = compiled(plan, "distributed")
    c.step(*part(c, batch()))
    values, said = c.state_dict(), []
    load_failing(c, values)
    for _ in range(2):
        try:
            c.state_dict()
        except ValueLost as error:
            said.append(str(error))
    c.load_state_dict(values)
    return {"said": said, "same": listed(c.state_dict()) == listed(values)}


def killed_writing(plan: str) -> dict[str, Any]:
    """The last rank is killed in the second step, with a value half written to its file and others on their way."""
    c = compiled(plan, "distributed", model=wide(), max_grad_norm=None)
    c.step(*part(c, batch()))
    write = os.pwritev

    def half(file: int, buffers: list[memoryview], offset: int) -> int:
        (memory,) = buffers
        if len(memory) > 2 * ALIGN:
            assert write(file, [memory[:ALIGN]], offset) == ALIGN
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, buffers, offset)

    if RANK == WORLD_SIZE - 1:
        os.pwritev = half  # type: ignore[assignment]
    for _ in range(2):
        c.step(*part(c, batch()))
    return {"finished": True}


def against_resident(plan: str) -> dict[str, Any]:
    """Whether the same training without offloading gives the same weights and optimizer state."""
    found = []
    for given in (plan, plan.partition("+offload")[0]):
        c = compiled(given, "distributed", model=wide(), max_grad_norm=None)
        losses = [c.step(*part(c, batch())).item() for _ in range(3)]
        found.append((losses, listed(c.state_dict()), listed(c.optimizer.state_dict()["state"])))
    return {"same": found[0] == found[1], "losses": found[0][0]}


def uneven(budget_gb: str) -> dict[str, Any]:
    """Sequences of another length on each rank, the other way round in the second step, a new one on rank 0 alone in
    the third, with and without a budget."""
    found: dict[str, Any] = {}
    for given in ("zero3+accum2", f"zero3+accum2+memory:budget_gb={budget_gb}"):
        module, _, loss_fn = gpt(depth=1, width=32, length=128)
        torch.manual_seed(RANK)
        more: dict[str, Any] = {
            "loss_fn": loss_fn,
            "executor": "distributed",
            "world_size": WORLD_SIZE,
            "timeout_s": 60.0,
        }
        c = graphshard.compile(module, given, optimizer=functools.partial(torch.optim.SGD, lr=0.1), **more)
        losses = []
        for length in ((32, 128), (128, 32), (64, 32)):
            ids = torch.randint(32, (2, length[RANK] + 1))
            losses.append(c.step(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).item())
        builds: list[Any] = list(c._builds.values())
        peaks = [max(build.plan.peak_bytes) for build in builds]
        nodes = [list(build.graphs.program.body.nodes()) for build in builds]
        repeated = [sum(info(node).made_by == "recompute" for node in body) for body in nodes]
        found[given] = {"losses": losses, "state": listed(c.state_dict()), "peaks": peaks, "repeated": repeated}
    free, kept = found.values()
    far = max(
        abs(torch.tensor(free["state"][name]) - torch.tensor(kept["state"][name])).max().item()
        for name in kept["state"]
    )
    return {"free": free["losses"], "far": far, **{key: kept[key] for key in ("losses", "peaks", "repeated")}}


class Centred(nn.Module):
    """:func:`model` with a buffer."""

    def __init__(self, centre: float = 0.5, seed: int = 0) -> None:
        super().__init__()
        self.layers = model(seed)
        self.centre: Tensor
        self.register_buffer("centre", torch.tensor(centre, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x - self.centre)
        return result


def differing(*plans: str) -> dict[str, Any]:
    """What each rank raises where others have other values, and the losses once all have the same, by plan; then what
    it raises where ranks do different things."""
    found: dict[str, Any] = {}
    for plan in plans:
        said: dict[str, str] = {}

        def attempt(what: str, call: Callable[..., Any], *given: Any, said: dict[str, str] = said) -> None:
            try:
                call(*given)
            except GraphshardError as error:
                said[what] = f"{type(error).__name__}: {error}"

        same, x, y = Centred().state_dict(), *batch()
        local = compiled(plan, "local", model=Centred())
        c = compiled(plan, "distributed", model=Centred(seed=RANK))
        mine = part(c, (x, y))
        attempt("seed", c.step, *mine)
        attempt("load before", c.load_state_dict, Centred(seed=RANK).state_dict())
        c.load_state_dict(same)
        losses = [c.step(*mine).item() - local.step(x, y).item()]
        attempt("load after", c.load_state_dict, Centred(centre=RANK).state_dict())
        state = c.optimizer.state_dict()
        moved = {name: {k: v + RANK for k, v in values.items()} for name, values in state["state"].items()}
        attempt("optimizer", c.optimizer.load_state_dict, state | {"state": moved})
        attempt("steps", c.optimizer.load_state_dict, state | {"steps": state["steps"] + RANK})
        groups = [group | {"betas": (0.9, 0.999 - 0.1 * RANK)} for group in state["param_groups"]]
        attempt("options", c.optimizer.load_state_dict, state | {"param_groups": groups})
        attempt("one refuses", c.load_state_dict, {} if RANK else same)
        attempt("optimizer of one refuses", c.optimizer.load_state_dict, {} if RANK else state)
        attempt("reading and loading", *([c.state_dict] if RANK else [c.load_state_dict, same]))
        early = compiled(plan, "distributed", model=Centred(seed=RANK))
        attempt("load early", early.load_state_dict, Centred(seed=RANK).state_dict())
        attempt("one refuses early", early.load_state_dict, {} if RANK else same)
        if RANK == 0:
            early.trace(*mine)  # to look at what explain says
        early.load_state_dict(c.state_dict())
        early.optimizer.load_state_dict(state)
        losses += [early.step(*mine).item() - (loss := c.step(*mine).item()), loss - local.step(x, y).item()]
        if plan == plans[0]:
            with torch.device("meta"):
                empty, buffer = Centred(), Centred()
            some = compiled(plan, "distributed", model=empty if RANK else Centred())
            attempt("none", some.step, *mine)
            random = compiled(
                plan, "distributed", model=buffer, init=lambda m: m.load_state_dict(Centred(centre=RANK).state_dict())
            )
            attempt("init", random.step, *mine)
            budgeted = compiled(f"{plan}+memory:budget_gb=1", "distributed", model=Centred())
            attempt("one traces", budgeted.trace, *(["x"] if RANK else mine))
        found[plan] = {"said": said, "far": max(map(abs, losses))}
    return found


def one_reads(plan: str) -> dict[str, Any]:
    """Rank 0 asks for all values, which all ranks have to do, while the other one trains."""
    c = compiled(plan, "distributed")
    mine = part(c, batch())
    c.step(*mine)
    if RANK:
        c.step(*mine)
    else:
        c.state_dict()
    return {}


def main() -> None:
    torch.set_num_threads(1)
    scenario, *arguments = sys.argv[1:]
    scenarios: dict[str, Callable[..., dict[str, Any]]] = {
        "trained": trained,
        "loaded": loaded,
        "closed": closed,
        "meta": meta,
        "in_place": in_place,
        "behind": behind,
        "mixed": mixed,
        "mismatch": mismatch,
        "given_up": given_up,
        "lost_by_one": lost_by_one,
        "not_ready": not_ready,
        "refused": refused,
        "killed_writing": killed_writing,
        "against_resident": against_resident,
        "uneven": uneven,
        "differing": differing,
        "one_reads": one_reads,
    }
    report(lambda given: scenarios[scenario](*given), arguments)


if __name__ == "__main__":
    main()
