"""A model of two matrix products as graph text, with a plain gradient step: what passes and lowering are tested on."""

from __future__ import annotations


def two_layers(mesh: str = "pp=2 dp=2", microbatches: int = 2) -> str:
    """The captured program on ``mesh``; modules ``a`` and ``b``, a row of four features each way."""
    return _TEXT.format(mesh=mesh, microbatches=microbatches)


_TEXT = """graphshard 1
mesh {mesh}
microbatches {microbatches}
param "a.w" : f32[4,4] group=0
param "b.w" : f32[4,4] group=0

graph prologue {{
  %zero = aten.full.default([], 0.0)
  %za = aten.full.default([4, 4], 0.0)
  %zb = aten.full.default([4, 4], 0.0)
  return carry "loss" %zero, carry "grad:a.w" %za, carry "grad:b.w" %zb
}}

graph body {{
  %a : f32[4,4] = param "a.w"
  %b : f32[4,4] = param "b.w"
  %x : f32[2,4] = batch 0
  %loss : f32[] = carry "loss"
  %ca : f32[4,4] = carry "grad:a.w"
  %cb : f32[4,4] = carry "grad:b.w"
  %h = aten.mm.default(%x, %a) {{module=a}}
  %y = aten.mm.default(%h, %b) {{module=b}}
  %l = aten.mean.default(%y) {{module=b}}
  %loss1 = aten.add.Tensor(%loss, %l)
  %gy = aten.full.default([2, 4], 0.125) {{phase=backward, module=b, forward=l}}
  %ht = aten.t.default(%h) {{phase=backward, module=b, forward=y}}
  %gb = aten.mm.default(%ht, %gy) {{phase=backward, module=b, forward=y}}
  %cb1 = aten.add.Tensor(%cb, %gb) {{phase=backward}}
  %bt = aten.t.default(%b) {{phase=backward, module=b, forward=y}}
  %gh = aten.mm.default(%gy, %bt) {{phase=backward, module=b, forward=y}}
  %xt = aten.t.default(%x) {{phase=backward, module=a, forward=h}}
  %ga = aten.mm.default(%xt, %gh) {{phase=backward, module=a, forward=h}}
  %ca1 = aten.add.Tensor(%ca, %ga) {{phase=backward}}
  return carry "loss" %loss1, carry "grad:a.w" %ca1, carry "grad:b.w" %cb1
}}

graph epilogue {{
  %loss : f32[] = carry "loss"
  %ga : f32[4,4] = carry "grad:a.w"
  %gb : f32[4,4] = carry "grad:b.w"
  %a : f32[4,4] = param "a.w"
  %b : f32[4,4] = param "b.w"
  %mean = aten.mul.Tensor(%loss, 0.5)
  %da = aten.mul.Tensor(%ga, 0.05)
  %a1 = aten.sub.Tensor(%a, %da)
  %db = aten.mul.Tensor(%gb, 0.05)
  %b1 = aten.sub.Tensor(%b, %db)
  return loss "loss" %mean, param "a.w" %a1, param "b.w" %b1
}}
"""
