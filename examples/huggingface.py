"""A transformers model, unchanged, trained by a plan: a small GPT-2 with random weights, all ranks in this process.

python examples/huggingface.py --plan zero3:size=2+pp2
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import graphshard


def make_model() -> GPT2LMHeadModel:
    """Two layers of width 64 over a vocabulary of 128; its embedding is tied to its head, as always in GPT-2."""
    config = GPT2Config(vocab_size=128, n_positions=32, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def make_batch(step: int, size: int) -> torch.Tensor:
    """Token ids [size, 32]: sequences that count upwards, each from its own start."""
    starts = torch.randint(128, (size, 1), generator=torch.Generator().manual_seed(step))
    return (starts + torch.arange(32)) % 128


def main(argv: Sequence[str] | None = None) -> None:
    """Train until the model can count, then let it count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", default="zero3:size=2+pp2")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    example = make_batch(0, 16)
    compiled = graphshard.compile(
        make_model(),
        plan=options.plan,
        optimizer=functools.partial(torch.optim.AdamW, lr=3e-3),
        # The model returns its loss when it is given labels, so there is no loss_fn: step takes what the model takes.
        example_inputs=((), {"input_ids": example, "labels": example}),
        max_grad_norm=1.0,
    )
    print(compiled.explain())
    for step in range(options.steps):
        batch = make_batch(step, 16)
        loss = compiled.step(input_ids=batch, labels=batch)
        if step % 10 == 0 or step + 1 == options.steps:
            print(f"step {step:3}  loss {loss.item():.3f}")
    logits = compiled(input_ids=make_batch(1000, compiled.dp_size)).logits
    print("given    ", make_batch(1000, 1)[0, :12].tolist())
    print("predicted", logits[0, :12].argmax(-1).tolist())

    state = compiled.state_dict()  # full tensors under the model's own names, tied ones included
    make_model().load_state_dict(state)
    print(f"{len(state)} tensors load into a fresh GPT2LMHeadModel")


if __name__ == "__main__":
    main()
