"""What passes decide by: the cost of an operation, the size of a value, which values are views of weights."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from graphshard.dataflow import is_getitem, is_view
from graphshard.program import Phase, Program, Role, Section, info, tensors, val
from graphshard.region import Region

aten = torch.ops.aten

FLOPS_PER_BYTE = 10.0
"""What one byte moved to or from memory costs, in FLOPs. A core of about 90 GFLOP/s reads 10 GB/s, a GPU of 67 TFLOP/s
in float32 about 5 TB/s: both are near 10, and pointwise work is all memory traffic."""

FLOPS_PER_SENT_BYTE = 50.0
"""What a byte sent to another rank costs, in FLOPs, if little of it is hidden: a core of 90 GFLOP/s beside 2 to 3 GB/s
through shared memory, a GPU of 67 TFLOP/s beside 450 GB/s of NVLink, or a tenth of that between machines."""

FLOPS_PER_HOST_BYTE = 1500.0
"""The same of a byte between a GPU and its host: 67 TFLOP/s beside 45 GB/s."""

FLOPS_PER_HOST_MEMORY_BYTE = 670.0
"""What a byte costs a GPU that its host's cores read or write meanwhile: 67 TFLOP/s beside 100 GB/s."""

FLOPS_PER_STORED_BYTE = 90.0
"""The same of a byte between host memory and a disk: a core of 90 GFLOP/s beside 1 GB/s."""

GPU_FLOPS_PER_STORED_BYTE = 67_000.0
"""The same of a byte between host memory and a disk, beside a GPU: 67 TFLOP/s beside 1 GB/s."""

_CASTS = (aten._to_copy.default, aten.clone.default, torch.ops.graphshard.cast.default)
_LOOKUPS = (aten.embedding.default, aten.gather.default, aten.index.Tensor, aten.index_select.default)


def nbytes(value: Any) -> int:
    """Bytes of a tensor's elements, summed over the tensors of a nested value."""
    return sum(t.numel() * t.element_size() for t in tensors(value))


def flops(node: fx.Node) -> int:
    """Floating-point operations of a node, a multiply-add being two; one per element without products."""
    if isinstance(node.target, Region):
        return sum(map(flops, node.target.operations))
    if not isinstance(node.target, torch._ops.OpOverload) or is_view(node):
        return 0
    shapes = [_shape(a) for a in node.args]
    wanted: Any
    match node.target._schema.name.rpartition("::")[2]:
        case "mm" | "bmm" | "grouped_mm" | "grouped_outer":
            return 2 * prod(shapes[0]) * shapes[1][-1]
        case "addmm" | "baddbmm":
            return 2 * prod(shapes[1]) * shapes[2][-1]
        case "mv" | "dot":
            return 2 * prod(shapes[0])
        case "convolution":
            # Every output element reads its kernel once; a transposed convolution scatters every input element instead.
            elements = prod(shapes[0]) if node.args[6] else prod(_shape(node))
            return 2 * elements * prod(shapes[1][1:])
        case "convolution_backward":
            elements = prod(shapes[1]) if node.args[7] else prod(shapes[0])
            wanted = node.args[10]
            products = int(wanted[0]) + int(wanted[1])
            return 2 * elements * prod(shapes[2][1:]) * products + prod(shapes[0]) * int(wanted[2])
        case name if "attention" in name and name.endswith("backward"):
            return 10 * prod(shapes[1]) * shapes[2][-2]  # five matrix products: the scores again and four gradients
        case name if "attention" in name:
            return 4 * prod(shapes[0]) * shapes[1][-2]
        case _:
            return sum(t.numel() for t in tensors(val(node)))


def cost(node: fx.Node) -> float:
    """Estimated time of a node in FLOPs: its own, and the bytes it moves at :data:`FLOPS_PER_BYTE`; 0 for views."""
    if node.op != "call_function" or is_getitem(node) or is_view(node):
        return 0.0
    moved = nbytes(val(node))
    # A lookup reads of its table as much as it returns.
    moved += moved if node.target in _LOOKUPS else sum(nbytes(val(source)) for source in node.all_input_nodes)
    return flops(node) + FLOPS_PER_BYTE * moved


def flops_per_moved_byte(home: str, on_gpu: bool) -> float:
    """What a byte costs that is moved between a device and ``home``, in FLOPs of the device."""
    if home == "nvme":
        return FLOPS_PER_HOST_BYTE + GPU_FLOPS_PER_STORED_BYTE if on_gpu else FLOPS_PER_STORED_BYTE
    return FLOPS_PER_HOST_BYTE if on_gpu else 2 * FLOPS_PER_BYTE  # read in one place and written in another


def has_products(node: fx.Node) -> bool:
    """Whether the node multiplies matrices: its FLOPs exceed its elements."""
    return flops(node) > sum(t.numel() for t in tensors(val(node)))


def is_complex(node: fx.Node) -> bool:
    """Whether the value holds complex numbers, of which there are no narrow ones."""
    return any(value.is_complex() for value in tensors(val(node)))


def is_random(node: fx.Node) -> bool:
    """Whether the node draws random numbers; attention without dropout does not, whatever its tag says."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or "attention" in target._schema.name:
        return False
    return torch.Tag.nondeterministic_seeded in target.tags


def widens(node: fx.Node) -> bool:
    """Whether the node is a cast that loses nothing and makes more bytes of the same value."""
    if node.target is not aten._to_copy.default:
        return False
    before, after = val(node.all_input_nodes[0]).dtype, val(node).dtype
    return bool(after != before and after == torch.promote_types(before, after))


def sent_as(node: fx.Node) -> fx.Node:
    """What to send to another stage that needs ``node``: where it shows all of another value of its phase, that one."""
    while (is_view(node) and node.target is not aten.as_strided.default and len(node.all_input_nodes) == 1) or widens(
        node
    ):
        (source,) = node.all_input_nodes
        if source.op != "call_function" or info(source).phase is not info(node).phase:
            break
        if not isinstance(val(node), torch.Tensor) or not isinstance(val(source), torch.Tensor):
            break
        if val(source).numel() > val(node).numel():
            break
        node = source
    return node


def weight_views(section: Section) -> set[fx.Node]:
    """Operations that alias, view, copy or cast one parameter and read nothing else."""
    found: set[fx.Node] = set()
    for node in section.nodes():
        sources = node.all_input_nodes
        if not sources or not (is_getitem(node) or is_view(node) or node.target in _CASTS):
            continue
        if all(s in found or (s in section.inputs and section.inputs[s].role is Role.PARAM) for s in sources):
            found.add(node)
    return found


def weight_views_cross(program: Program) -> list[fx.Node]:
    """Forward views and casts of parameters that the backward reads, in order.

    Empty after ``normalize``: a parameter gathered for the forward would otherwise stay whole until the backward.
    """
    views = weight_views(program.body)
    return [
        node
        for node in program.body.nodes()
        if node in views
        and info(node).phase is Phase.FORWARD
        and any(user.op != "output" and info(user).phase is not Phase.FORWARD for user in node.users)
    ]


def _shape(argument: Any) -> tuple[int, ...]:
    value = val(argument) if isinstance(argument, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()
