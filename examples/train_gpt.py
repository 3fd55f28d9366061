"""Train a byte-level GPT on the source of Python's standard library, by any plan.

graphshard run -n 4 examples/train_gpt.py --plan zero3+pp2      # four local processes
torchrun --nproc-per-node 8 examples/train_gpt.py --plan zero3  # the same script, GPUs when there are any
python examples/train_gpt.py --plan zero3+pp2                   # every rank of the plan inside one process
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import graphshard
from demo.corpus import Corpus
from demo.show import Progress, memory_table, pass_table, plot_losses
from graphshard.errors import BatchDoesNotSplit, GraphshardError
from graphshard.runtime.memory import peak_device_bytes

VOCABULARY = 256  # bytes
PROMPT = b"def "


class Block(nn.Module):
    """Pre-norm attention and feed-forward; [batch, seq, width] both ways."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + self.mlp(self.norm2(x))
        return x


class GPT(nn.Module):
    """A decoder whose output layer is its token embedding. Nothing in it knows that it will be distributed."""

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.token.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What is added to the residual stream starts smaller the more layers add to it (GPT-2, section 2.3).
                added = name.endswith(("proj.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if added else 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Token ids [batch, seq] to logits [batch, seq, 256]."""
        h = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.head(self.norm(h))
        return logits


def next_byte_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def factory() -> dict[str, Any]:
    """What ``graphshard explain examples/train_gpt.py:factory`` and its kin compile: the model at its default size."""
    return arguments(_parser().parse_args([]), dp_size=1)


def arguments(options: argparse.Namespace, dp_size: int) -> dict[str, Any]:
    """Arguments of ``graphshard.compile``; ``dp_size`` ranks share the batch."""
    torch.manual_seed(options.seed)
    example = torch.zeros(options.batch // dp_size, options.context, dtype=torch.long)
    return {
        "model": GPT(options.layers, options.width, options.heads, options.context),
        "loss_fn": next_byte_loss,
        "optimizer": functools.partial(torch.optim.AdamW, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1),
        "max_grad_norm": options.clip,
        "example_inputs": (example, example),
        "seed": options.seed,
    }


@dataclass(frozen=True)
class Ranks:
    """Where this process stands: one rank of several that a launcher started, or all of them at once."""

    rank: int
    world_size: int | None  # None: no launcher, every rank of the plan is in this process
    device: torch.device

    @classmethod
    def here(cls) -> Ranks:
        launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        world_size = int(os.environ["WORLD_SIZE"]) if launched else None
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        return cls(int(os.environ["RANK"]) if launched else 0, world_size, device)

    def gather(self, value: int) -> list[int]:
        """The value of every rank; nothing where one process is all of them."""
        values = [0] * (self.world_size or 0)
        if values:
            dist.all_gather_object(values, value)
        return values

    def part(self, compiled: graphshard.Executable, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """What ``step`` wants of a global batch."""
        if self.world_size is None:
            return batch
        return tuple(t.chunk(compiled.dp_size)[compiled.dp_rank] for t in batch)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, sample, and say what the compiler did."""
    options = _parser().parse_args(argv)
    ranks = Ranks.here()
    console = Console(quiet=ranks.rank != 0, highlight=False)
    folder: Path = options.out or Path("runs") / f"gpt-{time.strftime('%Y%m%d-%H%M%S')}"
    corpus = Corpus.read(options.context)
    console.print(
        f"text: {len(corpus.train) / 1e6:.1f} MB of Python's standard library in {corpus.files} files; "
        f"{len(corpus.held_out) / 1e6:.1f} MB in {corpus.held_out_files} others are held out"
    )
    start = time.perf_counter()
    try:
        plan = graphshard.Plan.parse(options.plan)
        mesh = plan.mesh(ranks.world_size)
        if options.batch % (mesh.dp_size * plan.microbatch_count(mesh)):
            shape = (options.batch, options.context)
            raise BatchDoesNotSplit(0, shape, 0, mesh.dp_size, plan.microbatch_count(mesh))
        dp_size = 1 if ranks.world_size is None else mesh.dp_size
        compiled = graphshard.compile(
            **arguments(options, dp_size), plan=plan, device=ranks.device, dump_dir=folder / "dump"
        )
    except GraphshardError as error:
        # The same on every rank: rank 0 says it, and fails for all.
        if ranks.rank == 0:
            print(f"train_gpt: {error}", file=sys.stderr)
        return 2 if ranks.rank == 0 else 0
    report = compiled.report()
    console.print(
        f"compiled {report['parameters'] / 1e6:.1f} M parameters for {len(report['ranks'])} ranks by {report['plan']} "
        f"in {time.perf_counter() - start:.0f} s; a step is {options.batch} x {options.context} bytes of text"
    )
    held_out = [ranks.part(compiled, batch) for batch in corpus.held_out_batches(options.batch, options.evaluations)]
    before = evaluate(compiled, held_out)
    metrics = folder / "metrics.jsonl" if ranks.rank == 0 else None
    losses = train(compiled, corpus, options, ranks, console, metrics)
    after = evaluate(compiled, held_out)
    console.print(f"held-out text: {before:.3f} bits per byte before training, [bold]{after:.3f}[/] after")
    text = sample(compiled, options, ranks)
    console.print("[bold]sample:[/]")
    console.print(text, markup=False)
    resident = ranks.gather(peak_device_bytes(ranks.device))
    if ranks.rank == 0:
        console.print(memory_table(report, one_device(compiled, options).report(), resident))
        console.print(pass_table(report))
        picture = plot_losses(losses, (before, after), folder / "loss.png")
        console.print(f"metrics  {metrics}\ndump     {folder / 'dump'}", soft_wrap=True)
        console.print(f"picture  {picture or 'none: matplotlib is not installed'}", soft_wrap=True)
    if ranks.world_size is not None:
        dist.barrier()
        dist.destroy_process_group()
    return 0


def evaluate(compiled: graphshard.Executable, batches: Sequence[tuple[Tensor, ...]]) -> float:
    """Mean loss in bits per byte."""
    return sum(compiled.evaluate(*batch).item() for batch in batches) / len(batches) / math.log(2)


def train(
    compiled: graphshard.Compiled,
    corpus: Corpus,
    options: argparse.Namespace,
    ranks: Ranks,
    console: Console,
    metrics: Path | None,
) -> list[float]:
    """All steps, the learning rate warming up, then falling along a cosine; the loss of each in nats per byte."""
    warmup = max(options.steps // 10, 1)

    def factor(step: int) -> float:
        done = (step - warmup) / max(options.steps - warmup, 1)
        return (step + 1) / warmup if step < warmup else 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    scheduler = LambdaLR(compiled.optimizer, factor)
    sent = sum(sum(rank["sent_bytes"].values()) for rank in compiled.report()["ranks"])
    losses: list[float] = []
    with Progress(console, options.steps, options.batch * options.context, sent, metrics) as progress:
        for step in range(options.steps):
            batch = corpus.batch(options.batch, step, options.seed)
            losses.append(compiled.step(*ranks.part(compiled, batch)).item())
            progress.step(step, losses[-1], float(scheduler.get_last_lr()[0]))
            scheduler.step()
    return losses


def sample(compiled: graphshard.Executable, options: argparse.Namespace, ranks: Ranks, temperature: float = 0.7) -> str:
    """Text that the model writes after a prompt, byte by byte; every rank calls it and gets the same."""
    generator = torch.Generator().manual_seed(options.seed)
    text = list(PROMPT)
    rows = compiled.dp_size if ranks.world_size is None else 1
    for _ in range(options.sample):
        seen = text[-options.context :]
        window = torch.tensor(seen + [0] * (options.context - len(seen)))
        logits = compiled(window.expand(rows, -1).contiguous())
        # Ranks of the last stage have the output. The sum over all, with a count of those, gives it to everybody.
        known = torch.zeros(VOCABULARY + 1, dtype=torch.float64, device=ranks.device)
        if logits is not None:
            known[:-1], known[-1] = logits[0, len(seen) - 1], 1
        if ranks.world_size is not None:
            dist.all_reduce(known)
        chances = (known[:-1] / known[-1] / temperature).softmax(0).cpu()
        text.append(int(torch.multinomial(chances, 1, generator=generator)))
    return bytes(text).decode("utf-8", errors="replace")


def one_device(compiled: graphshard.Compiled, options: argparse.Namespace) -> graphshard.Compiled:
    """The same step compiled for a single device, for its account alone: all micro-batches one after the other."""
    with torch.device("meta"):
        given = arguments(options, dp_size=1)
    plan = f"accum{compiled.microbatches * compiled.dp_size}"
    return graphshard.compile(**given, plan=plan, world_size=1, device="cpu", executor="none")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", default="zero3+pp2")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=128, help="bytes a prediction can see")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step, all ranks together")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--evaluations", type=int, default=8, help="batches of held-out text")
    parser.add_argument("--sample", type=int, default=160, help="bytes to generate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for metrics, picture and dump; default: runs/gpt-<time>")
    return parser


if __name__ == "__main__":
    sys.exit(main())
