"""What offloading to host memory costs and saves on a GPU, with recomputation and files behind it: one command, figures
beside what is wanted.

    python examples/bench/gpu.py --device cuda --path /scratch

1. Overlap: a step whose optimizer state is in host memory, as a Chrome trace (``--trace``); how much of the time of
   copies is hidden behind kernels, and the step's time beside the larger of computing and copying.
2. A capped device: the process may take less of the GPU's memory than parameters, gradients and optimizer state are.
   Training with all of it resident runs out of memory; with state and parameters in host memory it goes on, to the
   losses that it has without a cap.
3. recompute.py and offload.py on that device.

On a CPU all of it runs, and shows nothing: copies are not asynchronous, and memory is not capped.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import graphshard
from device import description, moved, reset_peak, seconds_so_far
from graphshard.runtime.memory import peak_device_bytes
from timeline import hidden

RESIDENT, STATE, ALL = "dp1", "dp1+offload:optimizer=cpu", "dp1+offload:optimizer=cpu,params=cpu"
HIDDEN, SLACK = 0.5, 1.25
"""Wanted: this part of what could be hidden is; a step takes at most so many times what it has to."""

STATES_BYTES = 4 * 4
"""Of each element: parameter, gradient, and AdamW's two."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print all figures; 1 if one is not as wanted."""
    options = _options(argv)
    device = torch.device(options.device)
    print(description(device))
    good = overlaps(options, device)
    _forget(device)
    good &= trains_capped(options, device)
    _forget(device)
    here = Path(__file__).parent
    for script, arguments in (("recompute.py", []), ("offload.py", ["--path", options.path])):
        if script not in options.skip:
            print(f"\n{script} --device {options.device}", flush=True)
            command = [sys.executable, str(here / script), "--device", options.device, *arguments]
            good &= subprocess.run(command).returncode == 0
    return 0 if good else 1


def overlaps(options: argparse.Namespace, device: torch.device) -> bool:
    """Whether enough of the copies is hidden, and a step takes no longer than it may."""
    seconds = {}
    for plan in (RESIDENT, STATE):
        run = compiled(plan, options, device, options.rows)
        batch = _batch(options, device, options.rows)
        for _ in range(2):  # the first makes the state, the second finds all memory allocated
            run.step(*batch)
        times = []
        for _ in range(options.steps):
            begin = seconds_so_far(device)
            run.step(*batch)
            times.append(seconds_so_far(device) - begin)
        seconds[plan] = statistics.median(times)
    traced = Path(options.trace)
    with torch.profiler.profile() as profile:
        run.step(*batch)
        seconds_so_far(device)
    profile.export_chrome_trace(str(traced))
    copies = hidden(json.loads(traced.read_text())["traceEvents"])
    copy_s = max(found.copy_s for found in copies.values())  # the two directions go on beside each other
    least, limit = max(seconds[RESIDENT], copy_s), SLACK * max(seconds[RESIDENT], copy_s)
    print(f"\noptimizer state in host memory; the trace of a step is {traced}")
    for way, found in copies.items():
        possible = min(1.0, seconds[RESIDENT] / found.copy_s) if found.copy_s else 1.0
        print(
            f"copies {way:3}: {found.nbytes / 1e6:.0f} MB in {found.copy_s * 1e3:.1f} ms "
            f"({found.bytes_per_second / 1e9:.1f} GB/s), {found.fraction:.0%} hidden "
            f"(wanted: {HIDDEN * possible:.0%}, possible: {possible:.0%})"
        )
    print(
        f"step {seconds[STATE] * 1e3:.1f} ms, all resident {seconds[RESIDENT] * 1e3:.1f} ms, the least "
        f"{least * 1e3:.1f} ms (wanted: at most {limit * 1e3:.1f} ms)"
    )
    enough = all(
        found.hidden_s >= HIDDEN * min(found.copy_s, seconds[RESIDENT]) for found in copies.values() if found.copy_s
    )
    return enough and seconds[STATE] <= limit


def trains_capped(options: argparse.Namespace, device: torch.device) -> bool:
    """Whether training fits a cap with offloading that it exceeds without, to the same losses."""
    expected, peak = _losses(RESIDENT, options, device)
    planned = {plan: compiled(plan, options, device, options.capped_rows).report() for plan in (RESIDENT, ALL)}
    stated = {plan: report["ranks"][0]["peak_bytes"] for plan, report in planned.items()}
    cap = sum(stated.values()) // 2
    states = STATES_BYTES * options.layers * options.width**2
    print(
        f"\nresident {stated[RESIDENT] / 1e6:.0f} MB stated, {peak / 1e6:.0f} MB measured, of which states "
        f"{states / 1e6:.0f}; cap {cap / 1e6:.0f} MB (wanted: less than the states)"
    )
    _forget(device)
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(cap / whole, device)
        refused = _runs_out(lambda: _losses(RESIDENT, options, device))
        print(f"resident under the cap: {'out of memory' if refused else 'fits'} (wanted: out of memory)")
    else:
        refused = True
    _forget(device)
    losses, peak = _losses(ALL, options, device)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    same = losses == expected
    print(f"offloaded: {stated[ALL] / 1e6:.0f} MB stated, {peak / 1e6:.0f} MB measured; losses {losses}")
    print(f"losses are {'the same as' if same else 'not the same as'} without a cap")
    return cap < states and refused and same


def compiled(plan: str, options: argparse.Namespace, device: torch.device, rows: int) -> graphshard.Compiled:
    """A chain of square linear layers with AdamW: its states are large for what a step computes."""
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(options.width, options.width, bias=False) for _ in range(options.layers)])
    return graphshard.compile(
        model,
        plan,
        loss_fn=nn.functional.mse_loss,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-4),
        init=_initialise,
        device=device,
        example_inputs=_batch(options, torch.device("cpu"), rows),
        executor="local",
    )


def _initialise(model: nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter.data, std=parameter.shape[-1] ** -0.5)


def _batch(options: argparse.Namespace, device: torch.device, rows: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    made = torch.randn(rows, options.width), torch.randn(rows, options.width)
    batch: tuple[Tensor, Tensor] = moved(made, device)
    return batch


def _losses(plan: str, options: argparse.Namespace, device: torch.device) -> tuple[list[float], int]:
    """Of three steps; and the peak of the last ones, the device's or the process's."""
    rows = options.capped_rows
    run, batch = compiled(plan, options, device, rows), _batch(options, device, rows)
    losses = [run.step(*batch).item()]
    reset_peak(device)
    losses += [run.step(*batch).item() for _ in range(2)]
    return losses, peak_device_bytes(device)


def _runs_out(training: Callable[[], object]) -> bool:
    try:
        training()
    except torch.OutOfMemoryError:
        return True
    return False


def _forget(device: torch.device) -> None:
    """Give back what an earlier part left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--path", default=tempfile.gettempdir(), help="folder on the disk")
    parser.add_argument("--trace", default="offload-trace.json", help="where the Chrome trace goes")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=16384, help="of the batch of 1")
    parser.add_argument("--capped-rows", type=int, default=1024, help="of the batch of 2")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each")
    parser.add_argument("--skip", nargs="*", default=[], help="recompute.py, offload.py")
    options = parser.parse_args(argv)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device here")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
