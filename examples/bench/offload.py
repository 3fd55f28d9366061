"""What NVMe offload takes and gives: memory and time of the same training with everything resident and with optimizer
state and parameters in a file, against the disk's own bandwidth.

    python examples/bench/offload.py --path /scratch

The folder must be on a disk that is accessed around the page cache (O_DIRECT): else both sides of the comparison would
be of memory, and the benchmark says so and exits with 1. ``--file-gb`` sets how much is kept in the files of all ranks.
Memory is the ranks' peak resident size after the first step, which makes the state; on a GPU, where there is one rank,
what torch allocated there. The step should take no longer than
the larger of computing and moving, with a quarter to spare.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import graphshard
from device import reset_peak
from graphshard.runtime.memory import peak_device_bytes
from graphshard.runtime.nvme import Disk

ROWS = {"resident": "zero3", "NVMe": "zero3+offload:optimizer=nvme,params=nvme,path={path}"}
_STATE_BYTES = 12  # of a parameter in the file: itself and AdamW's two averages


def main(argv: Sequence[str] | None = None) -> int:
    """Run both rows and print what is compared; 1 if a target is missed."""
    options = _options(argv)
    if options.row:
        _rank(options)
        return 0
    if options.file_gb:
        options.layers = max(1, round(options.file_gb * 1e9 / (_STATE_BYTES * options.width**2)))
    disk = Disk(options.path, torch.device("cpu"))
    print(f"disk: {disk.describe()}", end="", flush=True)
    if not disk.direct:
        print("; the page cache would be measured instead: give a --path on a file system that has O_DIRECT")
        return 1
    written, read = disk_bytes_per_second(disk, options.probe_mb * 10**6)
    print(f", writes {written / 1e6:.0f} MB/s, reads {read / 1e6:.0f} MB/s")
    rows = {row: _run(row, options) for row in ROWS}
    for row, found in rows.items():
        peak = "  ".join(f"{size / 1e6:.0f}" for size in found["peak_bytes"])
        print(f"{row:9} step {found['seconds']:.3f} s   peak of the ranks, MB: {peak}   losses {found['losses']}")
    moved = rows["NVMe"]["moved_bytes"]
    ranks = _ranks(options)
    limit = 1.25 * max(rows["resident"]["seconds"], ranks * (moved["to nvme"] / written + moved["from nvme"] / read))
    out = rows["NVMe"]["offloaded_bytes"]["nvme"]
    before, after = (sum(rows[row]["peak_bytes"]) / ranks for row in ROWS)
    print(f"a rank keeps {out / 1e6:.0f} MB in the file and moves {sum(moved.values()) / 1e6:.0f} MB a step")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    print(
        f"the files of {ranks} ranks hold {ranks * out / 1e9:.2f} GB, {ranks * out / memory:.1%} of the machine's "
        f"memory of {memory / 1e9:.2f} GB"
    )
    print(f"memory falls by {(before - after) / out:.0%} of what was moved out (wanted: 80%)")
    print(f"the step takes {rows['NVMe']['seconds']:.3f} s (wanted: at most {limit:.3f} s)")
    same = rows["NVMe"]["losses"] == rows["resident"]["losses"]
    print(f"losses are {'the same' if same else 'not the same'}")
    return 0 if same and before - after >= 0.8 * out and rows["NVMe"]["seconds"] <= limit else 1


def _ranks(options: argparse.Namespace) -> int:
    """NCCL has one rank on each GPU, and one GPU is what there is."""
    return 1 if torch.device(options.device).type == "cuda" else 2


def disk_bytes_per_second(disk: Disk, nbytes: int) -> tuple[float, float]:
    """Written and read, as much as the disk gives with several requests at a time. Closes it."""
    value, region = torch.ones(nbytes, dtype=torch.uint8), disk.allocate(nbytes)
    disk.write(value, region).wait()  # the file system gives out its blocks
    begin = time.perf_counter()
    disk.write(value, region).wait()
    middle = time.perf_counter()
    disk.read(region, value).wait()
    end = time.perf_counter()
    disk.close()
    return nbytes / (middle - begin), nbytes / (end - middle)


def _run(row: str, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "measured.json")
        processes = f"--nproc-per-node={_ranks(options)}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", processes, __file__]
        settings = ("layers", "width", "batch", "steps", "path", "device")
        arguments = [f"--{name}={getattr(options, name)}" for name in settings]
        subprocess.run([*command, *arguments, f"--row={row}", f"--output={output}"], check=True)
        measured: dict[str, Any] = json.loads(output.read_text())
        return measured


def _rank(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    device = torch.device(options.device)
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(options.width, options.width, bias=False) for _ in range(options.layers)])
    compiled = graphshard.compile(
        model,
        ROWS[options.row].format(path=options.path),
        loss_fn=nn.functional.mse_loss,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-4),
        init=_initialise,
        device=device,
    )
    torch.manual_seed(compiled.dp_rank)
    x, y = (torch.randn(options.batch, options.width, device=device) for _ in range(2))
    losses, seconds = [compiled.step(x, y).item()], []
    reset_peak(device)
    for _ in range(options.steps):
        dist.barrier()
        begin = time.perf_counter()
        losses.append(compiled.step(x, y).item())
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
    peaks: list[Any] = [None] * _ranks(options)
    dist.all_gather_object(peaks, peak_device_bytes(device))
    rank = compiled.report()["ranks"][0]
    if dist.get_rank() == 0:
        result = {
            "seconds": statistics.median(seconds),
            "losses": losses,
            "peak_bytes": peaks,
            "offloaded_bytes": rank["offloaded_bytes"],
            "moved_bytes": rank["moved_bytes"],
        }
        Path(options.output).write_text(json.dumps(result))


def _initialise(model: nn.Module) -> None:
    torch.manual_seed(0)

    def fill(value: Tensor) -> None:
        nn.init.normal_(value, std=value.shape[-1] ** -0.5)

    for parameter in model.parameters():
        fill(parameter.data)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", default=tempfile.gettempdir(), help="folder on the disk")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--file-gb", type=float, help="how much is in the files of all ranks, instead of --layers")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1024, help="rows of a rank")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--probe-mb", type=int, default=512, help="how much is written and read to know the disk")
    parser.add_argument("--row", choices=tuple(ROWS), help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
