"""Mutants are legal and mean something else; tests that do not notice them are named."""

from __future__ import annotations

import re

import pytest

from graphshard import text
from graphshard.check import check
from graphshard.errors import NotEquivalent, NothingToMutate, UnknownBreak
from graphshard.program import Program
from graphshard.rewrite import copied
from graphshard.testing import (
    BREAKS,
    Break,
    MutantsSurvived,
    apply,
    assert_same_meaning,
    check_mutations,
    mutants,
    nodes,
)
from graphshard.text import to_text
from graphshard.verify import check_rules, verify
from two_layers import two_layers

SHARDED = "normalize;pipeline-cut;zero:stage=3"
SLICES = """graphshard 1
graph body {
  %x : f32[4,4] = batch 0
  %y = aten.slice.Tensor(%x, 0, 0, 2)
  %z = aten.slice.Tensor(%x, 0, 1, 4)
  return output 0 %y, output 1 %z
}
"""


def made() -> list[Program]:
    """Programs that between them offer something to every break."""
    flat = two_layers("dp=2")
    blocks = flat.replace('"a.w"', '"h.0.a"').replace('"b.w"', '"h.0.b"').replace("grad:a.w", "grad:h.0.a")
    blocks = blocks.replace("grad:b.w", "grad:h.0.b")
    return [
        text.parse(SLICES),
        apply(SHARDED, text.parse(flat)),
        apply(f"{SHARDED};bucket;overlap", text.parse(blocks)),
        apply("normalize;pipeline-cut;zero:stage=0;overlap", text.parse(flat)),
        apply(SHARDED, text.parse(two_layers())),
    ]


@pytest.mark.parametrize("kind", BREAKS, ids=lambda kind: kind.name)
def test_every_kind_of_mutant_is_legal_and_differs_as_it_says(kind: Break) -> None:
    found = 0
    for program in made():
        before = to_text(program)
        for mutant in mutants(program, kinds=[kind.name]):
            check_rules(mutant.program)
            assert to_text(mutant.program) != before
            assert to_text(program) == before
            assert mutant.kind is kind
            if kind.same_meaning:
                check(program, mutant.program)
                found += 1
            else:
                found += differs(program, mutant.program)
    assert found


def differs(program: Program, mutant: Program) -> bool:
    """Whether a mutant computes something else; not all do: some values are the same by chance or by symmetry."""
    try:
        check(program, mutant)
    except NotEquivalent:
        return True
    return False


def test_only_what_a_pass_made_is_broken() -> None:
    before = apply("normalize;pipeline-cut", text.parse(two_layers("dp=2")))
    after = apply("zero:stage=0", before)
    said = [mutant.description for mutant in mutants(after, before, kinds=["scale"])]
    assert any("%mul_tensor" in line for line in said)
    unchanged = [node.name for node in before.body.nodes() if node.name in ("h", "gh")]
    assert unchanged == ["h", "gh"]
    assert not any("%gh " in str(mutant) for mutant in mutants(before, before))
    assert list(mutants(before, before)) == []


def test_a_test_of_the_meaning_notices_every_change_of_it() -> None:
    program = apply("normalize;pipeline-cut", text.parse(two_layers("dp=2")))

    def test(result: Program) -> None:
        assert_same_meaning(program, result)
        assert nodes(result).op("all_gather").count == 3

    found = check_mutations("zero:stage=3", program, test)
    assert not found.survived
    assert len(found.noticed) > 20


def test_a_weak_test_is_told_what_it_does_not_notice() -> None:
    program = apply("normalize;pipeline-cut", text.parse(two_layers("dp=2")))
    kinds = ["drop-collective", "scale"]

    def test(result: Program) -> None:
        assert nodes(result).op("all_reduce").count == 3

    with pytest.raises(MutantsSurvived) as raised:
        check_mutations("zero:stage=0", program, test, kinds=kinds)
    message = str(raised.value)
    assert re.match(r"\d+ of \d+ mutants went unnoticed:\n  scale: %\w+ scales by", message)
    assert "drop-collective" not in message


def test_the_test_must_pass_on_what_the_pass_made() -> None:
    def test(result: Program) -> None:
        raise ValueError("it does not")

    with pytest.raises(ValueError, match="it does not"):
        check_mutations("normalize", text.parse(two_layers("dp=2")), test)


def test_a_pass_that_makes_nothing_is_told() -> None:
    program = apply("normalize", text.parse(two_layers("dp=2")))
    with pytest.raises(NothingToMutate, match="the passes changed nothing that can be broken"):
        check_mutations("normalize", program, verify)


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(UnknownBreak, match="unknown kind of mutation 'drop-colective'; did you mean 'drop-collective'"):
        list(mutants(copied(made()[0]), kinds=["drop-colective"]))
