"""Programs as typed SSA text. Printing and parsing are inverses, and text -> Program -> text is stable.

::

    graphshard 1
    mesh pp=2 dp=2
    param "lin.weight" : f32[4,8] group=0

    graph body {
      %w : f32[4,8] = param "lin.weight"
      %x : f32[2,4] = batch 0
      %y : f32[2,8] = aten.mm.default(%x, %w) {module=lin}
      return output 0 %y
    }

A region holds the operations that become one kernel. Its inputs are known inside by their own names, or by others::

    %z : f32[2,8] = region(%y, %c=%x) {
      %z = aten.relu.default(%y)
      return %z
    } {made_by=fuse}

With ``autotune`` before its brace a kernel of it for a GPU searches its block sizes.

A node's attributes print where they differ from the default: the phase is ``forward`` in the body and ``update``
elsewhere, and the origin of an operation that no pass made is its own name. Strides print unless contiguous, devices
unless the CPU. How long a pass took is not part of the text, so that the same program always prints the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import fx

from graphshard.errors import TextError, UnreadableConstants
from graphshard.files import write_atomic
from graphshard.program import Bucket, NodeInfo, Param, Program, Role, Section
from graphshard.region import Region
from graphshard.text.parser import parse_program
from graphshard.text.spelling import (
    VERSION,
    TypeText,
    bare,
    content_hash,
    default_info,
    has_data,
    is_stored,
    quote,
    spell,
    spell_slot,
    spell_target,
    spell_type,
    to_stored,
    type_of,
    values_of,
)

_WIDTH = 120


def to_text(program: Program) -> str:
    """The whole program. Values of constants with more than 16 elements are not in it: see :func:`stored_constants`."""
    blocks = ["\n".join(header_lines(program))]
    for name, section in program.sections().items():
        if name == "body" or section is program.first_epilogue or len(section.graph.nodes) > 1:
            blocks.append(section_text(name, section))
    return "\n\n".join(blocks) + "\n"


def parse(text: str, constants: Mapping[str, torch.Tensor] | None = None) -> Program:
    """The program that ``text`` says; ``constants`` are the values stored beside it, by content hash.

    Types of operations may be left out: all are derived from the inputs' types, and what the text says must agree.

    Raises:
        TextError: with line and column, for text that is no program or says a wrong type.
    """
    return parse_program(text, constants or {}, "", "constants")


def write(program: Program, path: Path | str) -> None:
    """Write the text to ``path`` and large constants, if any, to ``<stem>.safetensors`` beside it, each atomically."""
    path = Path(path)
    if stored := stored_constants(program):
        write_atomic(_beside(path), save(stored))
    write_atomic(path, to_text(program))


def read(path: Path | str) -> Program:
    """Inverse of :func:`write`.

    Raises:
        TextError: with file, line and column, as :func:`parse` does.
        UnreadableConstants: the file beside it is no safetensors file.
        OSError: ``path`` cannot be read.
    """
    path, constants = Path(path), dict[str, torch.Tensor]()
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start].decode()
        line = before.rpartition("\n")[2]
        problem = f"byte {data[error.start]:#04x} is not UTF-8; expected graph text"
        raise TextError(str(path), before.count("\n") + 1, len(line) + 1, problem, line) from None
    if _beside(path).is_file():
        try:
            constants = load(_beside(path).read_bytes())
        except SafetensorError as error:
            raise UnreadableConstants(str(_beside(path)), str(error)) from error
    return parse_program(text, constants, str(path), str(_beside(path)))


def stored_constants(program: Program) -> dict[str, torch.Tensor]:
    """Values that :func:`to_text` leaves out, by content hash, for :func:`parse`."""
    large = [value for value in program.constants.values() if is_stored(value)]
    return {content_hash(value): to_stored(value) for value in large}


def header_lines(program: Program) -> list[str]:
    """Everything about a program but its graphs."""
    lines = [f"graphshard {VERSION}"]
    lines += [f"mesh {program.mesh}"] if program.mesh.axes else []
    lines += [f"level {program.level}", f"microbatches {program.microbatches}"]
    lines += map(_param_line, program.params.values())
    lines += map(_bucket_line, program.buckets.values())
    lines += [_constant_line(name, value) for name, value in program.constants.items()]
    for record in program.history:
        options = f" options={quote(record.options)}" if record.options else ""
        lines.append(f"history {quote(record.name)}{options} nodes={record.nodes}")
    return lines


def section_text(name: str, section: Section) -> str:
    """``graph body { ... }``."""
    lines = [f"graph {name} {{"]
    for node in section.graph.nodes:
        if node.op != "output":
            lines += (f"  {line}" for line in node_text(node, name, section).split("\n"))
    outputs = [f"{spell_slot(slot)} %{node.name}" for slot, node in section.outputs.items()]
    joined = f"  return {', '.join(outputs)}".rstrip()
    lines.append(joined if len(joined) <= _WIDTH else "  return " + ",\n         ".join(outputs))
    return "\n".join([*lines, "}"])


def node_text(node: fx.Node, section_name: str, section: Section) -> str:
    """One statement: ``%y : f32[2,8] = aten.mm.default(%x, %w) {module=lin}``; of a region several lines."""
    if node.op == "placeholder":
        slot = section.inputs.get(node)
        operation = "placeholder" if slot is None else spell_slot(slot)
    elif isinstance(node.target, Region):
        operation = _region_text(node, node.target, section_name, section)
    else:
        arguments = [*map(spell, node.args), *(f"{key}={spell(value)}" for key, value in node.kwargs.items())]
        operation = f"{spell_target(node.target)}({', '.join(arguments)})"
    kind = f" : {spell_type(type_of(node.meta['val']))}" if "val" in node.meta else ""
    attributes = _attributes(node, section_name)
    return f"%{node.name}{kind} = {operation}{attributes}"


def _region_text(node: fx.Node, region: Region, section_name: str, section: Section) -> str:
    inputs = [
        f"%{inner.name}" if inner.name == outer.name else f"%{inner.name}=%{outer.name}"
        for inner, outer in zip(region.inputs, node.args, strict=True)
        if isinstance(outer, fx.Node)
    ]
    lines = [f"region({', '.join(inputs)}){' autotune' if region.autotune else ''} {{"]
    lines += (f"  {node_text(inner, section_name, section)}" for inner in region.operations)
    lines.append(f"  return {', '.join(f'%{output.name}' for output in region.outputs)}")
    return "\n".join([*lines, "}"])


def _attributes(node: fx.Node, section_name: str) -> str:
    record = node.meta.get("info")
    if record is None:
        return ""
    default = default_info(section_name, node, record.made_by)
    words = []
    for name in _FIELDS:
        value = getattr(record, name)
        if name == "made_by":
            words += [f"made_by={bare(value)}"] if value else []
        elif value != getattr(default, name):
            words.append(f"{name}={bare(value) if isinstance(value, str) else value}")
    return f" {{{', '.join(words)}}}" if words else ""


_FIELDS = tuple(field.name for field in fields(NodeInfo))


def _param_line(param: Param) -> str:
    words = [f"param {quote(param.name)} : {TypeText(param.dtype, param.shape)}"]
    words += [f"group={param.group}"] if param.group is not None else []
    words += [f"aliases=[{', '.join(map(quote, param.aliases))}]"] if param.aliases else []
    words += [] if param.has_grad else ["has_grad=False"]
    words += [f"stages={list(param.stages)}"] if param.stages != (0,) else []
    return " ".join(words)


def _bucket_line(bucket: Bucket) -> str:
    members = ", ".join(f"{quote(name)}@{offset}" for name, offset in bucket.members)
    words = [f"bucket {quote(bucket.name)} : {TypeText(bucket.dtype, (bucket.numel,))}"]
    words += [f"axis={bucket.axis} parts={bucket.parts} stage={bucket.stage}"]
    words += [f"store={bucket.store}"] if bucket.store is not Role.FLAT else []
    return " ".join([*words, f"{{{members}}}"])


def _constant_line(name: str, value: torch.Tensor) -> str:
    kind = TypeText(value.dtype, tuple(value.shape), tuple(value.stride()), "cpu" if has_data(value) else "meta")
    line = f"constant {quote(name)} : {kind}"
    if not has_data(value):
        return line
    if is_stored(value):
        return f"{line} = sha256 {quote(content_hash(value))}"
    return f"{line} = {spell(values_of(value) if value.dim() else values_of(value)[0])}"


def _beside(path: Path) -> Path:
    return path.with_suffix(".safetensors")
