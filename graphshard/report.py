"""The account of a compiled program: what each pass did, bytes per rank, collectives, the schedule's bubble."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from graphshard import analysis
from graphshard.codegen.schedule import Schedule, simulate
from graphshard.execution import CATEGORIES, ExecutionPlan, Op
from graphshard.memory.model_states import bytes_per_parameter, explain_bytes, model_states
from graphshard.memory.saved_activations import saved_activations
from graphshard.memory.simulate import simulate_memory
from graphshard.memory.timeline import Timeline, simulated_timeline, timeline
from graphshard.offloaded import offloaded_bytes
from graphshard.plan import Plan
from graphshard.program import Phase, Program, Role, info
from graphshard.runtime import tuning
from graphshard.runtime.cuda_graphs import refusals
from graphshard.runtime.executor import Executor
from graphshard.runtime.meter import Measured
from graphshard.runtime.traffic import moved_bytes, sent_bytes
from graphshard.units import counted, human

MOST_OFF = 1.05
"""A measured peak may be so many times the simulated one."""


def report(
    program: Program, plan: ExecutionPlan, asked: Plan, executor: Executor | None = None, cache: str = ""
) -> dict[str, Any]:
    """Data that json can write: what ``compiled.report()`` promises, plus measured peaks and the machine's
    choices where there is an executor, and what the ``cache`` had to do with the plan."""
    flops, saved = stage_flops(program), saved_activations(program)
    stages = []
    for stage in range(program.stages):
        memory = simulate_memory(plan, stage)
        rank = plan.mesh.rank({"pp": stage})
        stages.append(
            {
                "peak_bytes": memory.peak_bytes,
                "memory": memory.at_peak,
                "sent_bytes": sent_bytes(plan, rank, first=False),
                "offloaded_bytes": offloaded_bytes(plan, stage),
                "moved_bytes": moved_bytes(plan, stage),
                "updated_by_cpu_bytes": _updated_by_cpu(plan, stage),
                "flops": sum(flops[stage].values()) * plan.microbatches,
                "collectives": _communications(plan, stage),
                "gathers_per_microbatch": _gathers(plan, stage),
                "peak_action": memory.peak_action,
                "model_states": model_states(program, plan, stage),
                "saved_activations": saved[stage].by_dtype,
                "saved_in_float32": saved[stage].float32,
                "peak_instruction": _told(plan, stage, memory.peak_position),
                "timeline": simulated_timeline(plan, stage).to_json(),
            }
        )
    measured = {} if executor is None else executor.measured(plan)
    ranks: list[dict[str, Any]] = []
    for rank in range(plan.mesh.world_size):
        stage = plan.mesh.coordinates(rank)["pp"]
        entry = {"rank": rank, "stage": stage, **stages[stage]}
        if rank in measured:
            entry |= _measured(plan, stage, measured[rank])
        if executor is not None and rank in executor.arenas:
            entry["arena_bytes"] = executor.arenas[rank].nbytes
        ranks.append(entry)
    costs = {phase: [float(f[phase]) for f in flops] for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.WEIGHT)}
    schedule = Schedule.parse(plan.schedule)
    simulated = simulate(schedule, costs[Phase.FORWARD], costs[Phase.BACKWARD], costs[Phase.WEIGHT])
    return {
        "plan": str(asked),
        "cache": cache,
        "mesh": dict(plan.mesh.axes),
        "microbatches": plan.microbatches,
        "parameters": sum(p.numel for p in plan.params.values()),
        "budget": _budget(plan, asked, measured),
        "bytes_per_parameter": bytes_per_parameter(program, plan),
        "ranks": ranks,
        "bubble_fraction": simulated.bubble_fraction,
        "passes": [
            {
                "name": r.name,
                "options": r.options,
                "seconds": r.seconds,
                "nodes": r.nodes,
                "changes": dict(r.changes),
            }
            for r in program.history
        ],
        "buckets": [
            {
                "name": b.name,
                "stage": b.stage,
                "bytes": b.numel * b.dtype.itemsize,
                "parts": b.parts,
                "parameters": len(b.members),
            }
            for b in plan.buckets.values()
        ],
        "kernels": [
            {
                "name": kernel.name,
                "how": f"{kernel.language}: {tuning.how(kernel)}",
                "workspace_bytes": kernel.workspace_bytes,
                "calls": sum(f"kernels.{kernel.name}(" in s.source for p in plan.stages for s in p.segments.values()),
            }
            for kernel in plan.kernels.values()
        ],
        "unfused": plan.unfused,
        "uncaptured": _uncaptured(plan, asked, executor),
        "stored": sorted({str(b.store) for b in plan.buckets.values()}),
        "machine": {} if executor is None else executor.choices(),
    }


def _budget(plan: ExecutionPlan, asked: Plan, measured: Mapping[int, Measured]) -> dict[str, int] | None:
    """What the plan allows a rank to hold, and what the fullest one does, in any step."""
    allowed = asked.budget_per_rank_bytes
    if allowed is None:
        return None
    found = {"bytes": allowed, "peak_bytes": max(plan.peak_bytes)}
    if measured:
        found["measured_peak_bytes"] = max(step.peak_bytes for step in measured.values())
    return found


def _uncaptured(plan: ExecutionPlan, asked: Plan, executor: Executor | None) -> dict[str, str]:
    """The segments that do not become CUDA graphs, with the reason, in a plan that asks for such."""
    if not asked.cudagraphs:
        return {}
    known = {name: reason for stage in range(len(plan.stages)) for name, reason in refusals(plan, stage).items()}
    return known | ({} if executor is None else executor.uncaptured(plan))


def _told(plan: ExecutionPlan, stage: int, position: int) -> str:
    """An instruction of a step with its position."""
    return f"{position} {' '.join(str(plan.stages[stage].step()[position]).split())}"


def _measured(plan: ExecutionPlan, stage: int, step: Measured) -> dict[str, Any]:
    return {
        "measured_peak_bytes": step.peak_bytes,
        "measured_memory": {name: size for name, size in step.fullest.items() if size},
        "measured_first_step": step.first,  # which finds no optimizer state, so that its peak may be lower
        "measured_timeline": timeline(plan.stages[stage].step(step.first), step.rows).to_json(),
    }


def measured_timelines(plan: ExecutionPlan, executor: Executor) -> dict[int, tuple[Timeline, bool]]:
    """By stage, where it was measured: the timeline of the fullest of its ranks, and whether it is of a first step,
    which finds no optimizer state."""
    fullest: dict[int, Measured] = {}
    for rank, step in executor.measured(plan).items():
        stage = plan.mesh.coordinates(rank)["pp"]
        if stage not in fullest or step.peak_bytes > fullest[stage].peak_bytes:
            fullest[stage] = step
    return {
        stage: (timeline(plan.stages[stage].step(step.first), step.rows), step.first) for stage, step in fullest.items()
    }


def stage_flops(program: Program) -> list[dict[Phase, int]]:
    """Floating-point operations of one micro-batch, by stage and phase."""
    result: list[dict[Phase, int]] = [dict.fromkeys(Phase, 0) for _ in range(program.stages)]
    for node in program.body.nodes():
        stage = info(node).stage
        if stage is not None:
            result[stage][info(node).phase] += analysis.flops(node)
    return result


def _communications(plan: ExecutionPlan, stage: int) -> dict[str, int]:
    """How many collectives, sends and receives a rank of ``stage`` starts in a step, by kind."""
    started = (ins for ins in plan.stages[stage].step() if ins.op in (Op.GATHER, Op.REDUCE, Op.SEND, Op.RECV))
    counts = Counter(ins.name if ins.op in (Op.GATHER, Op.REDUCE) else ins.op.lower() for ins in started)
    return dict(sorted(counts.items()))


def _gathers(plan: ExecutionPlan, stage: int) -> float:
    """How often a sharded parameter is gathered per micro-batch, averaged over buckets by bytes."""
    whole = sum(b.numel * b.dtype.itemsize for b in plan.buckets.values() if b.stage == stage and b.store is Role.SHARD)
    if not whole:
        return 0.0
    gathered = sum(
        ins.type.nbytes * plan.mesh.size(ins.axis)
        for ins in plan.stages[stage].step()
        if ins.op is Op.GATHER and ins.type is not None
    )
    return gathered / whole / plan.microbatches


def _updated_by_cpu(plan: ExecutionPlan, stage: int) -> int:
    """Bytes of what a rank keeps in host memory and the CPU updates there, instead of the device."""
    part = plan.stages[stage]
    read = {ref for ins in part.step() if ins.device for ref in ins.inputs if ref in part.homes}
    return sum(part.storages[ref.name].nbytes for ref in read)


def _listed(prefix: str, items: list[str], width: int = 140) -> list[str]:
    """``items`` behind ``prefix``, on as many lines as they need."""
    lines = [prefix]
    for index, item in enumerate(items):
        word = item + (", " if index + 1 < len(items) else "")
        if len(lines[-1]) + len(word) > width and len(lines[-1]) > len(prefix):
            lines.append(" " * len(prefix))
        lines[-1] += word
    return [line.rstrip() for line in lines]


def _memory(rank: dict[str, Any], measured: list[dict[str, Any]]) -> list[str]:
    """A table of what is held at the peak, simulated and measured; ``measured``: the ranks of the stage that were."""
    at = rank["peak_instruction"]
    lines = [f"           peak {human(rank['peak_bytes'])}, at {at if len(at) <= 110 else at[:109] + '…'}"]
    fullest = max(measured, key=lambda r: int(r["measured_peak_bytes"]), default=None)
    columns = [("simulated", rank["memory"], rank["timeline"]["most"])]
    if fullest is not None:
        columns.append(("measured", fullest["measured_memory"], fullest["measured_timeline"]["most"]))
    titles, width = "".join(f"{title:>12}" for title, *_ in columns), 12 * len(columns)
    lines += [
        f"           {'':22}{'at the peak':>{width}}   {'each at most':>{width}}",
        f"           {'':22}{titles}   {titles}",
    ]
    for name in CATEGORIES:
        if any(most.get(name) for *_, most in columns):
            at_peak = "".join(f"{human(held.get(name, 0)):>12}" for _, held, _ in columns)
            ever = "".join(f"{human(most.get(name, 0)):>12}" for *_, most in columns)
            lines.append(f"             {name:20}{at_peak}   {ever}")
    lines.append(f"             {'all':20}" + "".join(f"{human(sum(held.values())):>12}" for _, held, _ in columns))
    if fullest is not None and fullest["measured_first_step"]:
        lines.append("             measured in the first step, which has no optimizer state to begin with")
    elif fullest is not None:
        share = fullest["measured_peak_bytes"] / max(rank["peak_bytes"], 1) - 1
        lines.append(
            f"             the measured peak is {abs(share):.1%} {'below' if share < 0 else 'above'} the simulated one"
        )
    if "arena_bytes" in rank:
        block = human(rank["arena_bytes"])
        lines.append(
            f"             what a step makes lies in a block of {block}; the rest outlives the step or is outside"
        )
    return lines


def over_peak(plan: ExecutionPlan, asked: Plan, executor: Executor) -> str:
    """What a rank here that held more than the plan states, by more than the simulation may be off, or than the budget
    did; "" if none did."""
    here = {rank: step for rank, step in executor.measured(plan).items() if rank in executor.ranks}
    for rank, step in here.items():
        stated = plan.peak_bytes[plan.mesh.coordinates(rank)["pp"]]
        allowed = asked.budget_per_rank_bytes
        held = f"rank {rank} held {human(step.peak_bytes)} as measured"
        if step.peak_bytes > stated * MOST_OFF:
            return f"{held}, {step.peak_bytes / max(stated, 1) - 1:.0%} more than the {human(stated)} by simulation"
        if allowed is not None and step.peak_bytes > allowed:
            return f"{held}, more than its budget of {human(allowed)}"
    return ""


def _saved(rank: dict[str, Any]) -> list[str]:
    """What a forward keeps for its backward, and what of it a lower precision leaves wide."""
    if not rank["saved_activations"]:
        return []
    parts = [f"{human(size)} {dtype}" for dtype, size in rank["saved_activations"].items()]
    total = human(sum(rank["saved_activations"].values()))
    lines = _listed(f"           a micro-batch's forward saves {total}: ", parts)
    kinds = [f"{name} {human(size)}" for name, size in rank["saved_in_float32"].items()]
    return lines + (_listed("             float32 by autocast's lists and promotion: ", kinds) if kinds else [])


def _kernels(kernels: list[dict[str, Any]], unfused: Mapping[str, int]) -> list[str]:
    """What each region became, and in how many segments; which have no kernel, and why."""
    width = max((len(kernel["name"]) for kernel in kernels), default=0)
    rows = [f"  {kernel['calls']:3} x {kernel['name']:{width}}  {kernel['how']}" for kernel in kernels]
    left = [f"  {count:3} x {what}" for what, count in unfused.items()]
    lines = ["", "kernels (what regions became, with the segments that call each)", *rows] if rows else []
    return lines + (["", "regions that run operator by operator, in whole or in part", *left] if left else [])


def _kept_to(budget: dict[str, int]) -> list[str]:
    line = f"budget {human(budget['bytes'])} a rank: the fullest one holds {human(budget['peak_bytes'])} by simulation"
    if "measured_peak_bytes" in budget:
        over = "; that is over it" if budget["measured_peak_bytes"] > budget["bytes"] else ""
        line += f", {human(budget['measured_peak_bytes'])} as measured{over}"
    return ["", line]


def explain(data: dict[str, Any]) -> str:
    """One page of text from :func:`report`'s data."""
    mesh = " ".join(f"{k}={v}" for k, v in data["mesh"].items()) or "one rank"
    lines = [
        f"plan {data['plan']}: {mesh}, {counted(data['microbatches'], 'micro-batch', 'micro-batches')} per step "
        "and data-parallel rank, "
        f"{data['parameters']:,} parameters",
        *filter(None, [data["cache"]]),
        "",
        "passes",
    ]
    width = max((len(p["name"]) + len(p["options"]) + 3 for p in data["passes"]), default=0)
    for item in data["passes"]:
        title = item["name"] + (f" ({item['options']})" if item["options"] else "")
        changes = [f"{count:+} {what}" for what, count in item["changes"].items()] or ["no change of kind"]
        lines += _listed(f"  {title:{width}}  {item['nodes']:6} nodes  {item['seconds'] * 1e3:8.1f} ms  ", changes)
    lines += ["", "ranks (one per pipeline stage; its data-parallel peers are alike)"]
    seen: set[int] = set()
    for rank in data["ranks"]:
        if rank["stage"] in seen:
            continue
        seen.add(rank["stage"])
        sent = ", ".join(f"{axis} {human(n)}" for axis, n in rank["sent_bytes"].items()) or "nothing"
        lines.append(f"  stage {rank['stage']}: {human(rank['flops'], 'FLOP')} a step, sends {sent}")
        lines += _memory(rank, [r for r in data["ranks"] if r["stage"] == rank["stage"] and "measured_memory" in r])
        away = [f"{human(n)} in {home}" for home, n in rank["offloaded_bytes"].items()]
        away += [f"{human(n)} {way} a step" for way, n in rank["moved_bytes"].items()]
        lines += _listed("           off the device: ", away) if away else []
        if rank["updated_by_cpu_bytes"]:
            lines.append(f"           updated by the CPU, in host memory: {human(rank['updated_by_cpu_bytes'])}")
        started = [f"{count} {name.replace('_', '-')}" for name, count in rank["collectives"].items()]
        lines += _listed("           starts per step: ", started or ["no communication"])
        states = ", ".join(f"{what} {human(n)}" for what, n in rank["model_states"].items())
        lines += [f"           model states {human(sum(rank['model_states'].values()))}: {states}"]
        lines += _saved(rank)
        if rank["gathers_per_microbatch"]:
            lines.append(
                f"           each parameter is gathered {rank['gathers_per_microbatch']:.2f} times per micro-batch"
            )
    lines += _kept_to(data["budget"]) if data["budget"] is not None else []
    lines += explain_bytes(data["bytes_per_parameter"])
    lines += ["", f"bubble: {data['bubble_fraction']:.1%} of the schedule, by FLOPs", "", "buckets"]
    for bucket in data["buckets"]:
        size = f"{human(bucket['bytes']):>9}  {bucket['parameters']:3} parameters"
        lines.append(f"  stage {bucket['stage']}  {size}  {bucket['name']}")
    lines += _kernels(data["kernels"], data["unfused"])
    if data["uncaptured"]:
        lines += ["", "segments that are no CUDA graphs", *(f"  {s}: {why}" for s, why in data["uncaptured"].items())]
    if data["machine"]:
        lines += ["", "this machine", *(f"  {what}: {choice}" for what, choice in data["machine"].items())]
    return "\n".join(lines) + "\n"
