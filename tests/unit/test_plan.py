"""The plan string: grammar, inference of sizes, and what its errors say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphshard.errors import GraphshardError, PlanFieldError, PlanNotSupported, PlanSizeError, PlanSyntaxError
from graphshard.mesh import Mesh
from graphshard.plan import SCHEDULES, Plan
from graphshard.plan_options import PLACES, POLICIES, Memory, Offload, Precision, Recompute

sizes = st.none() | st.integers(1, 4096)
paths = st.lists(st.from_regex(r"[a-z][a-z0-9_.\-]{0,6}", fullmatch=True), max_size=4, unique=True).map(tuple)


positive = st.floats(0, exclude_min=True, allow_infinity=False)
patterns = st.lists(st.from_regex(r"[a-z*][a-z0-9_.*?\-]{0,6}", fullmatch=True), max_size=3).map(tuple)
directories = st.none() | st.from_regex(r"/[a-z0-9/._\-=]{0,9}", fullmatch=True)


@st.composite
def precisions(draw: st.DrawFn) -> Precision:
    if draw(st.booleans()):
        return Precision("bf16", draw(st.sampled_from(["fp32", "bf16"])))
    growth = draw(st.floats(1, 100, exclude_min=True))
    backoff = draw(st.floats(0, 1, exclude_min=True, exclude_max=True))
    reduce = draw(st.sampled_from(["fp32", "fp16"]))
    return Precision("fp16", reduce, draw(positive), growth, backoff, draw(st.integers(1, 9999)))


@st.composite
def recomputes(draw: st.DrawFn) -> Recompute:
    policy = draw(st.sampled_from(POLICIES))
    modules, ops = draw(patterns), draw(patterns)
    if policy == "custom" and (modules or ops):
        return Recompute(policy, modules, ops)
    return Recompute("auto", budget_gb=draw(positive)) if policy == "auto" else Recompute("selective")


@st.composite
def offloads(draw: st.DrawFn) -> Offload:
    place = st.sampled_from([None, *PLACES])
    optimizer, params, activations = draw(st.tuples(place, place, place).filter(any))
    path = "/scratch/a" if "nvme" in (optimizer, params, activations) else None
    return Offload(optimizer, params, activations, path)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    zero_stage, stages = draw(st.integers(0, 3)), draw(paths)
    recompute, offload = draw(st.none() | recomputes()), draw(st.none() | offloads())
    folders = directories if offload is None or offload.path is None else st.sampled_from([None, offload.path])
    room = st.none() | st.floats(0, exclude_min=True, allow_infinity=False)
    budgeted = recompute is not None and recompute.budget_gb is not None
    fitting = st.sampled_from([len(stages) + 1, max(len(stages), 1)])
    return Plan(
        dp=draw(sizes),
        zero_stage=zero_stage,
        shard=draw(sizes) if zero_stage else None,
        budget_gb=draw(st.none() | st.floats(0, allow_infinity=False)) if zero_stage > 1 else None,
        pp=draw(fitting if stages else sizes),
        schedule=draw(st.sampled_from(SCHEDULES)),
        microbatches=draw(sizes),
        stages=stages,
        accum=draw(st.integers(1, 64)),
        batch_dims=tuple(sorted(draw(st.dictionaries(st.integers(0, 9), st.none() | st.integers(0, 3))).items())),
        precision=draw(st.none() | precisions()),
        recompute=recompute,
        offload=offload,
        memory=None if budgeted else draw(st.none() | st.builds(Memory, positive, folders, room)),
        cudagraphs=draw(st.booleans()),
    )


@given(plans())
def test_str_and_parse_are_inverses(plan: Plan) -> None:
    assert Plan.parse(str(plan)) == plan


@given(st.text(alphabet="dpzero123+:=,/.siaccumbtchg 1fb", max_size=24))
def test_any_text_parses_or_is_a_plan_error_within_the_text(text: str) -> None:
    try:
        plan = Plan.parse(text)
    except (PlanSyntaxError, PlanNotSupported) as error:
        assert 1 <= error.column <= len(text) + 1
    else:
        assert Plan.parse(str(plan)) == plan


@pytest.mark.parametrize(
    "text",
    [
        "dp",
        "dp4",
        "zero1",
        "zero2",
        "zero3",
        "zero3:size=4",
        "zero3:budget_gb=0.5",
        "pp4",
        "pp4:microbatches=8",
        "pp4:schedule=zb-h1,microbatches=8",
        "pp2:stages=h.4/h.8",
        "pp3:stages=h.4/h.8",
        "accum8",
        "dp2+zero3:size=4",
        "zero3+pp4",
        "dp2+zero3:size=4,budget_gb=2+pp4:schedule=gpipe+accum2+batch_dims:1=none,2=1",
        "bf16",
        "bf16:reduce=bf16",
        "zero3+pp2+accum2+fp16:reduce=fp16,init_scale=1024,growth_interval=4",
        "recompute:policy=full",
        "recompute:policy=custom,modules=h.*.mlp/head,ops=gelu",
        "recompute:policy=auto,budget_gb=1.5",
        "offload:optimizer=cpu",
        "zero3+offload:optimizer=nvme,params=nvme,activations=cpu,path=/scratch/run=1",
        "zero3+memory:budget_gb=2,path=/scratch",
        "zero3+memory:budget_gb=2,path=/scratch,host_gb=0.5",
        "cudagraphs",
        "zero3+bf16+cudagraphs",
    ],
)
def test_canonical_spellings(text: str) -> None:
    assert str(Plan.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("pp4+zero3", "zero3+pp4"),
        ("pp4:schedule=1f1b", "pp4"),
        ("accum1+dp1", "dp1"),
        ("dp1+zero3", "zero3"),
        ("dp+zero3:size=4", "zero3:size=4"),
        ("pp:stages=h.4/h.8", "pp3:stages=h.4/h.8"),
        ("batch_dims:2=1,1=none+dp", "dp+batch_dims:1=none,2=1"),
        ("recompute", "recompute:policy=full"),
        ("bf16:reduce=fp32+dp2", "dp2+bf16"),
        ("memory:budget_gb=1e30", "memory:budget_gb=1e30"),
        ("cudagraphs+dp2", "dp2+cudagraphs"),
    ],
)
def test_other_spellings_print_canonically(text: str, canonical: str) -> None:
    assert str(Plan.parse(text)) == canonical


def test_no_tokens_set_is_one_rank() -> None:
    assert str(Plan()) == "dp1"
    assert Plan().mesh(1) == Plan().mesh() == Mesh()


@pytest.mark.parametrize(
    ("text", "world_size", "mesh"),
    [
        ("zero3+pp4", 8, "pp=4 dp=2"),
        ("zero3+pp4", 64, "pp=4 dp=16"),
        ("zero3+pp4", None, "pp=4 dp=2"),
        ("zero3+pp4", 4, "pp=4"),
        ("pp4", None, "pp=4"),
        ("pp4", 4, "pp=4"),
        ("pp", 4, "pp=4"),
        ("zero3+pp", None, "pp=2 dp=2"),
        ("dp", 3, "dp=3"),
        ("dp", None, "dp=2"),
        ("zero3", 1, ""),
        ("dp2+zero3:size=4", None, "dp=2 shard=4"),
        ("dp2+zero3:size=4", 8, "dp=2 shard=4"),
        ("dp2+zero3", 8, "dp=2 shard=4"),
        ("dp2+zero3:size=2+pp2", None, "pp=2 dp=2 shard=2"),
        ("zero3:size=4", None, "dp=4"),
        ("zero3:size=4", 4, "dp=4"),
        ("zero3:size=4", 8, "dp=2 shard=4"),
        ("dp1+zero3:size=4", 4, "dp=4"),
    ],
)
def test_sizes_are_inferred(text: str, world_size: int | None, mesh: str) -> None:
    assert str(Plan.parse(text).mesh(world_size)) == mesh


@pytest.mark.parametrize(
    ("text", "world_size", "says"),
    [
        ("zero3+pp4", 6, "it fits 4, 8, 12, …; on 6 ranks pp may be 1, 2, 3 or 6"),
        ("zero3+pp4", 2, "it fits 4, 8, …; on 2 ranks pp may be 1 or 2"),
        ("pp4", 8, "it fits 4; on 8 ranks pp may be 8; on 8 ranks dp may be 2"),
        ("dp1+zero3:size=4", 8, "it fits 4; on 8 ranks dp may be 2; on 8 ranks zero3:size may be 8"),
        ("dp2+zero3", 2, "it fits 4, 6, …; on 2 ranks dp may be 1"),
        ("pp3:stages=h.4/h.8", 6, "it fits 3; on 6 ranks dp may be 2"),
        ("zero3+pp", 8, "it leaves the sizes of pp and zero3 open: state all but one"),
        ("zero3", 0, "it fits 1, 2, …"),
    ],
)
def test_a_misfit_names_the_sizes_that_would_fit(text: str, world_size: int, says: str) -> None:
    with pytest.raises(PlanSizeError) as caught:
        Plan.parse(text).mesh(world_size)
    assert str(caught.value) == f"plan {text!r} does not fit {world_size} ranks; {says}"


@given(plans(), st.integers(1, 64))
def test_a_mesh_has_as_many_ranks_as_asked_for_and_keeps_stated_sizes(plan: Plan, world_size: int) -> None:
    try:
        mesh = plan.mesh(world_size)
    except PlanSizeError:
        return
    assert mesh.world_size == world_size
    assert plan.pp in (None, mesh.size("pp"))
    if mesh.size("shard") > 1:
        assert plan.zero_stage
        assert plan.shard in (None, mesh.size("shard"))
        assert plan.dp in (None, mesh.size("dp"))


@pytest.mark.parametrize(
    ("text", "column", "says"),
    [
        ("zreo3+pp4", 1, "did you mean 'zero3'?"),
        ("zero3+ppp4", 7, "did you mean 'pp4'?"),
        ("zero3+acum8", 7, "did you mean 'accum8'?"),
        ("zero4", 1, "did you mean 'zero3'?"),
        ("zero", 1, "did you mean 'zero3'?"),
        ("PP4", 1, "did you mean 'pp4'?"),
        ("dp=4", 1, "did you mean 'dp4'?"),
        ("xyz", 1, "known: dp, pp,"),
        ("", 1, "one rank is 'dp1'"),
        ("zero3+", 7, "a token is missing"),
        ("zero1+zero3", 7, "contradicts or repeats 'zero1'"),
        ("dp+dp2", 4, "contradicts or repeats 'dp'"),
        ("dp0", 3, "at least 1, not '0'"),
        ("accum", 1, "such as accum8"),
        ("zero3:siez=4", 7, "did you mean 'size'?"),
        ("zero3:size=x", 12, "at least 1, not 'x'"),
        ("zero3:size=2,size=2", 14, "given twice"),
        ("dp2+zero1:size=2,budget_gb=1", 18, "once a step anyway, so that budget_gb would do nothing; it is for zero2"),
        ("zero3:budget_gb=-1", 17, "at least 0, not '-1'"),
        ("zero3:budget_gb=nan", 17, "at least 0, not 'nan'"),
        ("zero3+pp4:schedule=1fb1", 20, "did you mean '1f1b'?"),
        ("pp4:", 5, "expected an option key=value"),
        ("pp4:8", 5, "expected an option key=value, not '8'"),
        ("dp4:size=2", 5, "it takes none"),
        ("pp2:stages=a/b/c", 12, "pp2 takes 1 module path(s)"),
        ("pp3:stages=a/a", 12, "given twice"),
        ("pp3:stages=a//b", 12, "'' is not a module path"),
        ("batch_dims", 1, "such as batch_dims:1=none"),
        ("batch_dims:1=non", 14, "at least 0 or none, not 'non'"),
        ("batch_dims:1=0,01=1", 16, "given twice"),
        ("bf16+fp16", 6, "contradicts or repeats 'bf16'"),
        ("dp2+fp32", 5, "leave 'fp32' out"),
        ("bf17", 1, "did you mean 'bf16'?"),
        ("bf16:init_scale=2", 6, "bf16 has no option 'init_scale'"),
        ("bf16:reduce=fp16", 13, "reduce is 'fp32' or 'bf16'"),
        ("fp16:backoff_factor=1", 21, "a finite number above 0 and below 1"),
        ("fp16:growth_interval=0", 22, "an integer of at least 1"),
        ("fp16:growth_interval=x", 22, "an integer, not 'x'"),
        ("dp2+recompute:policy=all", 22, "policy is 'full' or 'selective' or 'custom' or 'auto'"),
        ("recompute:policy=auto", 1, "recompute needs budget_gb: a number with policy=auto"),
        ("recompute:policy=custom", 18, "policy is custom together with modules or ops"),
        ("recompute:modules=h", 19, "modules is for policy=custom, to say"),
        ("recompute:policy=custom,ops=a b", 29, "patterns of names"),
        ("offload", 1, "offload needs optimizer, params or activations"),
        ("offload:optimizer=disk", 19, "'cpu' or 'nvme'"),
        ("offload:params=nvme", 1, "offload needs path: a folder with nvme"),
        ("offload:params=cpu,path=/x", 25, "path is a folder with nvme, and none without"),
        ("memory:budget_gb=1+recompute:policy=auto,budget_gb=1", 1, "memory has the budget"),
        (
            "offload:params=nvme,path=/x+memory:budget_gb=1,path=/y",
            1,
            "memory: expected the path of offload: a rank has",
        ),
        ("memory", 1, "memory needs budget_gb: a finite number above 0"),
        ("memory:budget_gb=-1", 18, "a finite number above 0"),
        ("memory:budget_gb=1,host_gb=-1", 28, "a finite number of at least 0"),
        ("dp2+cudagraph", 5, "did you mean 'cudagraphs'?"),
        ("cudagraphs:pool=1", 12, "it takes none"),
        ("cudagraphs+dp2+cudagraphs", 16, "contradicts or repeats 'cudagraphs'"),
    ],
)
def test_a_mistake_points_at_its_column(text: str, column: int, says: str) -> None:
    with pytest.raises(PlanSyntaxError) as caught:
        Plan.parse(text)
    assert caught.value.column == column
    assert str(caught.value).startswith(f"plan {text!r}, column {column}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("tp2", 1),
        ("zero3+tp", 7),
        ("pp4:virtual=2", 5),
    ],
)
def test_known_tokens_of_later_versions_are_refused(text: str, column: int) -> None:
    with pytest.raises(PlanNotSupported, match="is not supported in this version") as caught:
        Plan.parse(text)
    assert caught.value.column == column


@pytest.mark.parametrize(
    ("text", "world_size", "count"),
    [
        ("dp", 2, 1),
        ("zero3+accum8", 2, 8),
        ("pp4", 4, 8),
        ("zero3+pp4", 4, 8),
        ("pp4+accum2", 4, 16),
        ("pp4:microbatches=3", 4, 3),
        ("pp4:microbatches=3+accum2", 4, 6),
        ("pp1:microbatches=3", 1, 3),
        ("pp", 1, 1),
    ],
)
def test_microbatches_per_step(text: str, world_size: int, count: int) -> None:
    plan = Plan.parse(text)
    assert plan.microbatch_count(plan.mesh(world_size)) == count


@pytest.mark.parametrize(("text", "starts"), [("pp2:stages=a/b", ("b",)), ("pp3:stages=a/b", ("a", "b")), ("pp2", ())])
def test_stages_name_where_each_stage_or_each_later_one_begins(text: str, starts: tuple[str, ...]) -> None:
    assert Plan.parse(text).stage_starts == starts


def test_budget_is_decimal_gigabytes() -> None:
    assert Plan.parse("zero3:budget_gb=0.5").budget_bytes == 500_000_000
    assert Plan.parse("zero3").budget_bytes is None


@pytest.mark.parametrize(
    "fields",
    [
        {"dp": 0},
        {"accum": None},
        {"zero_stage": 4},
        {"shard": 2},
        {"budget_gb": 1.0},
        {"zero_stage": 1, "budget_gb": 1.0},
        {"zero_stage": 3, "budget_gb": -1.0},
        {"schedule": "interleaved"},
        {"stages": ("a+b",)},
        {"pp": 2, "stages": ("a", "b", "c")},
        {"pp": 3, "stages": ("a", "a")},
        {"batch_dims": ((1, 0), (1, None))},
        {"precision": "bf16"},
    ],
)
def test_fields_that_no_string_could_say_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(PlanFieldError) as caught:
        Plan(**fields)  # type: ignore[arg-type]
    assert isinstance(caught.value, GraphshardError)
