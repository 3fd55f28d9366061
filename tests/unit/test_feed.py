"""What a step finds is sorted by where it comes from, and nothing is left out."""

from __future__ import annotations

from graphshard.execution import read_refs, result_refs, slot_ref
from graphshard.program import Role
from graphshard.runtime.feed import sort_feed
from handmade import GPIPE, two_stages


def test_every_value_that_a_step_reads_has_one_source() -> None:
    plan = two_stages(2, GPIPE)
    for stage in range(2):
        reads, results = read_refs(plan, stage, False), result_refs(plan, stage)
        feed = sort_feed(1, reads, results)
        sources = [part.ref for part in feed.parts]
        sources += [ref for of in (feed.keys, feed.lrs, feed.constants, feed.kept, feed.taken) for ref, _ in of]
        assert sorted(map(str, sources)) == sorted(map(str, reads))
        assert {ref for ref, _ in feed.taken} == reads.keys() & results.keys()
        for part in feed.parts:
            assert slot_ref(part.slot, part.microbatch) == part.ref and part.slot.role is Role.BATCH
