"""A pass that decides what memory-policy may decide, for tests of what obeys it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graphshard.communication import communicates
from graphshard.pipeline import Context
from graphshard.program import MemoryTag, Phase, Program, info, set_info, val


@dataclass(frozen=True)
class TagSaved:
    """Tag every forward value, views included, that the backward reads; parameters are gathered anew."""

    min_bytes: int = 1
    tag: MemoryTag = MemoryTag.OFFLOAD
    name: ClassVar[str] = "tag-saved"
    exact: ClassVar[bool] = True
    after: ClassVar[str] = "pipeline-cut"

    def run(self, program: Program, ctx: Context) -> Program:
        for node in program.body.nodes():
            saved = any(user.op != "output" and info(user).phase is not Phase.FORWARD for user in node.users)
            if info(node).phase is Phase.FORWARD and saved and not communicates(node):
                value = val(node)
                if isinstance(value, Tensor) and value.numel() * value.element_size() >= self.min_bytes:
                    set_info(node, tag=self.tag)
        return program
