"""How fast graphshard is on one GPU, as ratios measured in one run with the same shapes: AdamW's update against torch's
fused one and copying; norms, SwiGLU, softmax and cross-entropy against eager, torch.compile and Liger; a training step
of a Llama of 1.2 billion parameters in bf16 against eager and torch.compile, also with recompute and with offload.

    python examples/bench/speed.py --only update rms-norm
    python examples/bench/speed.py --quick

Each part is a process of its own. Results are kept by part: running one of them replaces its table and leaves the
others. On a CPU (``--device cpu --quick``) everything runs at tiny sizes under Triton's interpreter, and the numbers
mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from device import description
from graphshard.files import write_atomic
from speed_part import PARTS
from speed_table import failed, missed, page, section

WORKER = Path(__file__).with_name("speed_part.py")
RESULTS = Path(__file__).with_name("results-gpu.md")
WEIGHTS = {"update": 1.0, "llama": 4.0, "recompute": 3.0, "offload": 2.0}
"""How what is left of the time is shared out to the parts that are left; the others get 1."""
GRACE_S = 5.0
"""A part that does not end by itself is ended so much before the time is up."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts and write the tables; 1 if something failed."""
    options = _options(argv)
    device = torch.device(options.device)
    scale = "full" if not options.quick else "quick" if device.type == "cuda" else "tiny"
    machine = f"{description(device)}, triton {triton.__version__}"
    print(machine, flush=True)
    results = _known(options.output.with_suffix(".json"))
    deadline, bad, less = time.monotonic() + options.budget, False, list[str]()
    for index, name in enumerate(options.only):
        left, rest = deadline - time.monotonic(), options.only[index:]
        share = left * WEIGHTS.get(name, 1.0) / sum(WEIGHTS.get(other, 1.0) for other in rest)
        print(f"\n{name}", flush=True)
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        part = {"machine": machine, "when": when, "scale": scale}
        part |= run_part(name, options.device, scale, share, left - GRACE_S)
        print("\n".join(section(name, part)), flush=True)
        bad |= failed(part)
        less += missed(name, part)
        results[name] = part
        _write(results, options.output)
    if less:
        print("\nless than wanted:\n" + "\n".join(f"  {line}" for line in less))
    print(f"\nwritten to {options.output} and {options.output.with_suffix('.json').name}")
    return int(bad)


def run_part(name: str, device: str, scale: str, seconds: float, most: float) -> dict[str, Any]:
    """What a part measured. It begins nothing after ``seconds``, and is ended after ``most``; "died": how it ended, if
    not well."""
    if most <= 0:
        return {"rows": [], "skipped": ["all of it"]}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "measured.json"
        command = [sys.executable, str(WORKER), name, f"--device={device}", f"--scale={scale}"]
        interpret = {"TRITON_INTERPRET": "1"} if torch.device(device).type == "cpu" else {}
        process = subprocess.Popen(
            [*command, f"--seconds={seconds}", f"--output={output}"],
            env=os.environ | interpret,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that it can be ended with what it started
        )
        died = ""
        try:
            said, _ = process.communicate(timeout=most)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            died = f"ended after {most:.0f} s"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        if process.returncode and not died:
            died = f"exit status {process.returncode}: {_last(said)}"
        found: dict[str, Any] = json.loads(output.read_text()) if output.is_file() else {"rows": [], "skipped": []}
        return found | ({"died": died} if died else {})


def _last(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _known(path: Path) -> dict[str, Any]:
    """Results of earlier runs, by part."""
    return json.loads(path.read_text()) if path.is_file() else {}


def _write(results: dict[str, Any], path: Path) -> None:
    ordered = {name: results[name] for name in PARTS if name in results}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path.with_suffix(".json"), json.dumps(ordered, indent=2) + "\n")
    write_atomic(path, page(ordered))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument("--quick", action="store_true", help="small sizes, a minute or two; results go to runs/")
    parser.add_argument("--budget", type=float, default=540.0, metavar="S", help="seconds for all of it")
    parser.add_argument("--output", type=Path, help="Markdown file; a JSON file of its name is written beside it")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device here")
    if device.type != "cuda" and not options.quick:
        parser.error(f"on {device.type} it can only be tried: add --quick")
    if options.output is None:
        options.output = Path("runs/speed.md") if options.quick else RESULTS
    return options


if __name__ == "__main__":
    sys.exit(main())
