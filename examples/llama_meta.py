"""A Llama as large as wanted, on the meta device: what a plan would cost, without owning the machines.

::

    graphshard dump examples/llama_meta.py:llama --plan zero3+pp4 --world-size 64 -o llama.dump
    graphshard explain examples/llama_meta.py:llama_8 --plan zero3+pp4 --world-size 64
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphshard


def build(layers: int, hidden: int = 4096, seq: int = 2048, batch: int = 4096) -> dict[str, Any]:
    """Arguments of ``graphshard.compile``: a Llama of ``layers`` layers, nothing of it in memory.

    ``batch`` sequences are the global batch; 4096 splits for up to 512 data-parallel ranks of eight micro-batches.
    """
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        tokens = torch.empty(batch, seq, dtype=torch.int64)
    optimizer = functools.partial(torch.optim.AdamW, lr=3e-4, weight_decay=0.1)
    return {
        "model": model,
        "example_inputs": ((), {"input_ids": tokens, "labels": tokens}),
        "optimizer": optimizer,
        "max_grad_norm": 1.0,
    }


def llama() -> dict[str, Any]:
    """7 billion parameters: 32 layers of width 4096."""
    return build(32)


def llama_16() -> dict[str, Any]:
    """Half the layers."""
    return build(16)


def llama_8() -> dict[str, Any]:
    """A quarter of the layers."""
    return build(8)


def main() -> None:
    """Print what a plan costs."""
    parser = argparse.ArgumentParser(description="What a plan would cost for a Llama that exists on paper.")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--plan", default="zero3+pp4")
    parser.add_argument("--world-size", type=int, default=64)
    arguments = parser.parse_args()
    compiled = graphshard.compile(
        **build(arguments.layers), plan=arguments.plan, world_size=arguments.world_size, executor="none"
    )
    print(compiled.explain())


if __name__ == "__main__":
    main()
