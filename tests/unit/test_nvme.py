"""The file that offloaded values are kept in: what is written is read, and what goes wrong is said."""

from __future__ import annotations

import errno
import functools
import gc
import mmap
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import graphshard
from graphshard.errors import OffloadFailed, OffloadPath, OffloadSpace, ValueLost
from graphshard.execution import type_of
from graphshard.plan import Plan
from graphshard.runtime.leftovers import Owner
from graphshard.runtime.nvme import ALIGN, PIECE, Disk, Region
from graphshard.runtime.offload import Homes

CPU = torch.device("cpu")


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(str(tmp_path), CPU)


@pytest.mark.parametrize("numel", [1, 1023, ALIGN // 4, PIECE // 4, PIECE // 4 + 1, 3 * PIECE // 4 - 5])
def test_what_is_written_is_read(disk: Disk, numel: int) -> None:
    first, second = torch.rand(numel), torch.rand(numel)
    regions = [disk.allocate(value.nbytes) for value in (first, second)]
    for value, region in zip((first, second), regions, strict=True):
        disk.write(value, region).wait()
    for value, region in zip((first, second), regions, strict=True):
        found = torch.empty(numel)
        disk.read(region, found).wait()
        assert torch.equal(found, value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool, torch.int64])
def test_any_dtype_and_any_dense_layout(disk: Disk, dtype: torch.dtype) -> None:
    value = torch.randint(0, 2, (7, 5)).to(dtype).t()
    region = disk.allocate(value.nbytes)
    disk.write(value, region).wait()
    found = torch.empty_strided(value.shape, value.stride(), dtype=dtype)
    disk.read(region, found).wait()
    assert torch.equal(found, value)


@pytest.mark.parametrize("numel", [PIECE // 4, PIECE // 4 + 1, PIECE])
def test_large_values_are_read_in_place(disk: Disk, numel: int) -> None:
    value = torch.rand(numel)
    region = disk.allocate(value.nbytes)
    disk.write(value, region).wait()
    found = disk.empty(type_of(value))
    assert found.data_ptr() % ALIGN == 0
    assert found.storage_offset() == 0 and found.untyped_storage().nbytes() == value.nbytes
    disk.read(region, found).wait()
    assert torch.equal(found, value)
    disk.write(found.mul_(2), region).wait()
    disk.read(region, value).wait()
    assert torch.equal(found, value)


def test_transfers_of_many_values_are_on_their_way_at_once(disk: Disk) -> None:
    values = [torch.full((PIECE,), float(i)) for i in range(6)]
    regions = [disk.allocate(value.nbytes) for value in values]
    for transfer in [disk.write(value, region) for value, region in zip(values, regions, strict=True)]:
        transfer.wait()
    found = [torch.empty_like(value) for value in values]
    for transfer in [disk.read(region, value) for region, value in zip(regions, found, strict=True)]:
        transfer.wait()
    assert all(torch.equal(a, b) for a, b in zip(values, found, strict=True))


def test_a_region_is_used_again_when_nobody_holds_it(disk: Disk) -> None:
    region = disk.allocate(ALIGN)
    offset = region.offset
    assert disk.allocate(ALIGN).offset != offset
    transfer = disk.write(torch.zeros(ALIGN, dtype=torch.uint8), region)
    del region
    assert disk.allocate(ALIGN).offset != offset  # the transfer holds it
    transfer.wait()
    del transfer
    assert offset in {disk.allocate(ALIGN).offset for _ in range(3)}


def test_a_region_stays_until_its_transfer_has_ended_though_nobody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a failed step: what is written later is not overwritten by what was under way."""
    homes = Homes(CPU, str(tmp_path))
    go_on, written, write = threading.Event(), threading.Event(), os.pwritev

    def slow(file: int, parts: list[memoryview], at: int) -> int:
        go_on.wait(10.0)
        count = write(file, parts, at)
        written.set()
        return count

    monkeypatch.setattr(os, "pwritev", slow)
    kept, transfer = homes.offload(torch.zeros(ALIGN // 4), "nvme")
    assert isinstance(kept.place, Region)
    offset, region = kept.place.offset, weakref.ref(kept.place)
    del kept, transfer
    others = [homes.disk.allocate(ALIGN) for _ in range(3)]
    assert region() is not None and offset not in {other.offset for other in others}
    settled = threading.Thread(target=homes.settle)
    settled.start()
    settled.join(0.2)  # it would have ended, did it not wait
    assert settled.is_alive() and not written.is_set()
    go_on.set()
    settled.join()
    assert written.is_set()
    homes.close()  # its threads have ended, and hold nothing
    assert region() is None


def test_nobody_holds_a_value_that_has_been_written(disk: Disk) -> None:
    region = disk.allocate(PIECE)
    for _ in range(200):
        block = mmap.mmap(-1, PIECE)
        watched = weakref.ref(block)
        disk.write(torch.frombuffer(block, dtype=torch.uint8), region).wait()
        del block
        assert watched() is None


@pytest.mark.parametrize("plan", ["dp", "zero1:size=2+accum2", "zero2:size=2+pp2", "zero3:size=1+bf16"])
def test_parameters_of_more_than_a_piece_train_the_same(tmp_path: Path, plan: str) -> None:
    """Views of a bucket begin where its storage does."""

    def trained(plan: str) -> list[Any]:
        torch.manual_seed(0)
        layers = [nn.Linear(512, 520), nn.Tanh(), nn.Linear(520, 512)]
        made = graphshard.compile(
            nn.Sequential(*layers),
            plan,
            loss_fn=nn.functional.mse_loss,
            optimizer=functools.partial(torch.optim.AdamW, lr=1e-2),
            world_size=Plan.parse(plan).mesh().world_size,
            executor="local",
        )
        x, y = torch.randn(8, 512), torch.randn(8, 512)
        losses = [made.step(x, y) for _ in range(2)]
        return [losses, made.evaluate(x, y), made(x), made.state_dict()]

    found = trained(f"{plan}+offload:params=nvme,path={tmp_path}")
    assert same(found, trained(plan))


def test_room_is_made_before_it_is_needed(tmp_path: Path) -> None:
    disk = Disk(str(tmp_path), CPU)
    disk.reserve({3 * ALIGN - 1: 4, 10: 2})
    free = os.fstat(disk._file).st_size
    assert free == 12 * ALIGN + 2 * ALIGN
    disk.reserve({3 * ALIGN: 4})
    kept = [disk.allocate(n) for n in (3 * ALIGN, 3 * ALIGN - 1, 10, 1)]
    assert os.fstat(disk._file).st_size == free and len({region.offset for region in kept}) == 4


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], threading.Event]:
    """What says when a file is closed, by whichever thread."""
    events: dict[int, threading.Event] = {}
    close = os.close

    def closing(file: int) -> None:
        close(file)
        if file in events:
            events[file].set()

    monkeypatch.setattr(os, "close", closing)
    return lambda file: events.setdefault(file, threading.Event())


def test_a_file_is_given_back_when_nobody_holds_it(tmp_path: Path, closed: Callable[[int], threading.Event]) -> None:
    disk, value = Disk(str(tmp_path), CPU), torch.rand(PIECE)
    given_back, region = closed(disk._file), disk.allocate(value.nbytes)
    disk.write(value, region).wait()
    found = disk.empty(type_of(value))
    under_way = disk.read(region, found)
    del disk
    under_way.wait()  # which still has it
    assert given_back.wait(10.0)
    assert torch.equal(found, value)
    del region


def test_a_file_is_given_back_once(tmp_path: Path, closed: Callable[[int], threading.Event]) -> None:
    """Its number may be another one's by then."""
    disk = Disk(str(tmp_path), CPU)
    given_back = closed(disk._file)
    disk.close()
    assert given_back.is_set()
    given_back.clear()
    other = os.open(tmp_path, os.O_RDONLY)
    disk.close()
    del disk
    os.fstat(other)
    assert not given_back.is_set()
    os.close(other)


def test_the_file_of_a_compiled_model_goes_with_it(tmp_path: Path, closed: Callable[[int], threading.Event]) -> None:
    plan = f"zero3:size=1+offload:optimizer=nvme,params=nvme,path={tmp_path}"
    options: dict[str, Any] = {"loss_fn": nn.functional.mse_loss, "optimizer": torch.optim.Adam, "executor": "local"}
    compiled = graphshard.compile(nn.Linear(600, 600), plan, **options)
    compiled.step(torch.randn(4, 600), torch.randn(4, 600))
    assert compiled._runtime is not None
    given_back, values = closed(compiled._runtime.homes.disk._file), compiled.state_dict()
    kept = {name: value.clone() for name, value in values.items()}
    del compiled
    gc.collect()
    assert given_back.wait(10.0)
    assert all(torch.equal(values[name], kept[name]) for name in kept)


def test_nothing_has_a_name(tmp_path: Path, disk: Disk) -> None:
    disk.allocate(PIECE)
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_direct_access_or_unnamed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open
    tmpfile, direct = getattr(os, "O_TMPFILE", 0), getattr(os, "O_DIRECT", 0)

    def limited(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & direct or (tmpfile and flags & tmpfile == tmpfile):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", limited)
    disk = Disk(str(tmp_path), CPU)
    assert disk.describe() == f"buffered in {tmp_path}" and not list(tmp_path.iterdir())
    value, region = torch.rand(5000), disk.allocate(20000)
    disk.write(value, region).wait()
    found = torch.empty(5000)
    disk.read(region, found).wait()
    assert torch.equal(found, value)


_NAMED = """
import os, signal, sys
from graphshard.runtime.leftovers import make_file
print(make_file(sys.argv[1])[1], flush=True)
if sys.argv[2] == "killed": os.kill(os.getpid(), signal.SIGKILL)
sys.stdin.read()
"""


def test_what_a_process_left_that_was_killed_before_its_file_lost_its_name(tmp_path: Path) -> None:
    """Another one's, which is alive, stays; and so does what is not known to be left."""

    def started(how: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _NAMED, str(tmp_path), how]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with started("killed") as dead, started("stays") as alive:
        assert dead.stdout is not None and alive.stdout is not None
        left, used = (Path(output.readline().strip()) for output in (dead.stdout, alive.stdout))
        dead.wait()
        machine, boot, *others = left.name.removeprefix(".graphshard-").split("-")
        elsewhere, before = (
            left.with_name("-".join([".graphshard", *begin, *others])) for begin in (["a", boot], [machine, "b"])
        )
        unknown = tmp_path / ".graphshard-notes"
        for file in (elsewhere, before, unknown):
            file.touch()
        assert left.exists()
        Disk(str(tmp_path), CPU).close()
        assert set(tmp_path.iterdir()) == {used, elsewhere, unknown}
        alive.communicate()
    Disk(str(tmp_path), CPU).close()
    assert set(tmp_path.iterdir()) == {elsewhere, unknown}


def test_an_id_that_another_process_has_now(tmp_path: Path) -> None:
    owner = Owner.this()
    assert not owner.is_gone()
    assert replace(owner, began="1").is_gone() and not replace(owner, namespace="1").is_gone()


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(OffloadPath, match=r"the folder for offloaded values '.*nowhere' is not a folder"):
        Disk(str(tmp_path / "nowhere"), CPU)


def test_a_folder_that_takes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: True)
    with pytest.raises(OffloadPath, match="the folder for offloaded values '/proc/self' takes no file: "):
        Disk("/proc/self", CPU)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OffloadPath, match="may not be written to"):
        Disk(str(tmp_path), CPU)


def test_a_plan_without_a_folder_is_refused_before_anything_is_traced(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    plan = f"zero3:size=2+offload:optimizer=nvme,path={tmp_path / 'nowhere'}"
    with pytest.raises(OffloadPath, match="is not a folder"):
        graphshard.compile(model, plan, executor="local")
    graphshard.compile(model, plan, executor="none")  # the plan may be for another machine


@pytest.mark.parametrize("path", ["here", "~/here"])
def test_a_folder_is_the_one_that_it_was_when_the_plan_was_compiled_or_loaded(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the process is when the first step makes the file; the plan says what was given."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    x = torch.ones(4, 4)
    plan = f"zero3:size=2+offload:params=nvme,path={path}"
    compiled = graphshard.compile(
        nn.Linear(4, 4), plan, loss_fn=nn.functional.mse_loss, example_inputs=(x, x), executor="local"
    )
    compiled.dump("dumped")
    loaded = graphshard.load("dumped", nn.Linear(4, 4), trust_code=True, executor="local")
    assert str(compiled.plan) == str(loaded.plan) and path in str(compiled.plan)
    monkeypatch.chdir("/")
    for made in (compiled, loaded):
        made.step(x, x)
        assert f"in {tmp_path / 'here'}" in made.explain()


def test_files_need_a_folder() -> None:
    with pytest.raises(OffloadPath, match="is not given; offload:optimizer=nvme,path=DIR says where"):
        Homes(CPU).keep(torch.ones(2), "nvme")


def test_a_full_disk_is_told_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    optimizer = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    made = graphshard.compile(
        torch.nn.Linear(4, 4),
        f"zero3:size=2+offload:optimizer=nvme,path={tmp_path}",
        loss_fn=torch.nn.functional.mse_loss,
        optimizer=optimizer,
        executor="local",
    )
    before = made.model.state_dict()
    monkeypatch.setattr(os, "posix_fallocate", full)
    x = torch.ones(4, 4)
    with pytest.raises(OffloadSpace):
        made.step(x, x)
    monkeypatch.undo()
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    made.step(x, x)


def test_a_step_that_fails_while_it_reads_leaves_parameters_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = graphshard.compile(
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)),
        f"zero3:size=2+offload:params=nvme,path={tmp_path}",
        loss_fn=torch.nn.functional.mse_loss,
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
        executor="local",
    )
    x = torch.ones(4, 4)
    made.step(x, x)
    before = made.state_dict()
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(OffloadFailed, match="short read"):
        made.step(x, x)
    monkeypatch.undo()
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    made.step(x, x)


class Failing:
    """A system call that fails at its ``nth`` time from now on, and every time after that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.left = sys.maxsize
        self._real, self._lock = getattr(os, name), threading.Lock()
        monkeypatch.setattr(os, name, self)

    def __call__(self, *args: object) -> int:
        with self._lock:
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.EIO, "Input/output error")
        made: int = self._real(*args)
        return made


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("call", ["preadv", "pwritev"])
@pytest.mark.parametrize(
    ("plan", "places"),
    [
        ("zero3:size=2", "optimizer=nvme"),
        ("dp2", "optimizer=nvme"),
        ("zero3:size=2", "optimizer=nvme,params=nvme"),
        ("zero3:size=2+fp16", "optimizer=nvme"),
    ],
)
def test_whenever_the_disk_fails_a_step_nothing_is_half_new(
    plan: str, places: str, call: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every failure either all is as it was, or what is not is said to be lost; a checkpoint brings it back."""
    torch.manual_seed(0)
    x = torch.randn(4, 4)
    made = graphshard.compile(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        f"{plan}+offload:{places},path={tmp_path}",
        loss_fn=nn.functional.mse_loss,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-2),
        example_inputs=(x, x),
        executor="local",
    )
    for _ in range(steps):
        made.step(x, x)
    parameters, state = made.state_dict(), made.optimizer.state_dict()
    made.step(x, x)
    following = made.state_dict(), made.optimizer.state_dict()
    failing = Failing(monkeypatch, call)
    outcomes = []
    for nth in range(sys.maxsize):
        made.load_state_dict(parameters)
        made.optimizer.load_state_dict(state)
        failing.left = nth
        try:
            made.step(x, x)
        except OffloadFailed as error:
            outcomes.append(
                re.findall("; the update was half done: .* of this run are lost; load a checkpoint", str(error))
            )
        else:
            break
        finally:
            failing.left = sys.maxsize
        if outcomes[-1]:
            with pytest.raises(ValueLost, match="was lost when a step failed in the middle of its update; load a"):
                made.step(x, x)
            for read, wanted in ((made.state_dict, parameters), (made.optimizer.state_dict, state)):
                with suppress(ValueLost):
                    assert same(read(), wanted)
        else:
            assert same((made.state_dict(), made.optimizer.state_dict()), (parameters, state))
            made.step(x, x)
            assert same((made.state_dict(), made.optimizer.state_dict()), following)
    assert same((made.state_dict(), made.optimizer.state_dict()), following)
    assert any(outcomes) or call == "preadv"


def same(found: object, wanted: object) -> bool:
    """Whether the tensors in two containers are the same to the bit."""
    pairs = [[leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in (found, wanted)]
    return all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


@pytest.mark.parametrize("nth", [0, 1, 2])
@pytest.mark.parametrize("loaded", ["parameters", "state"])
def test_a_checkpoint_that_cannot_be_written_leaves_no_mixture(
    loaded: str, nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of what was written and what was not, nor of old and new masters and parameters."""
    made = graphshard.compile(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        f"zero3:size=2+bf16+offload:params=nvme,optimizer=nvme,path={tmp_path}",
        loss_fn=nn.functional.mse_loss,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-2),
        executor="local",
    )
    x = torch.ones(4, 4)
    made.step(x, x)
    parameters, state = made.state_dict(), made.optimizer.state_dict()
    made.step(x, x)
    following = made.state_dict(), made.optimizer.state_dict()
    load, read, given = (
        (made.load_state_dict, made.state_dict, parameters)
        if loaded == "parameters"
        else (made.optimizer.load_state_dict, made.optimizer.state_dict, state)
    )
    failing = Failing(monkeypatch, "pwritev")
    failing.left = nth
    with pytest.raises(OffloadFailed):
        load(given)
    failing.left = sys.maxsize
    for use in (read, lambda: made.step(x, x)):
        with pytest.raises(ValueLost, match="was lost when loading it failed; load a checkpoint"):
            use()
    made.load_state_dict(parameters)
    made.optimizer.load_state_dict(state)
    assert same((made.state_dict(), made.optimizer.state_dict()), (parameters, state))
    made.step(x, x)
    assert same((made.state_dict(), made.optimizer.state_dict()), following)


@pytest.mark.parametrize(
    ("code", "pages", "says"),
    [
        (errno.ENOSPC, 2, r", which it refuses although [\d,]+ are free \(No space left on device\): a quota or"),
        (errno.ENOSPC, 2**48, r", where [\d,]+ are free \(No space left on device\); offload less"),
        (errno.EDQUOT, 2, r", which are over the quota there \(Disk quota exceeded\); offload less"),
    ],
)
def test_a_full_disk_says_what_is_needed_and_why_it_is_not_there(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, code: int, pages: int, says: str
) -> None:
    def full(file: int, offset: int, length: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OffloadSpace, match=f"needs {pages * ALIGN:,} bytes more in '.*'{says}"):
        disk.reserve({pages * ALIGN: 1})


def test_all_that_a_plan_needs_is_named_before_a_parameter_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def full(file: int, offset: int, length: int) -> None:
        asked.append(length)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    made = graphshard.compile(
        nn.Linear(64, 64, bias=False),
        f"zero3:size=2+offload:optimizer=nvme,params=nvme,path={tmp_path}",
        loss_fn=nn.functional.mse_loss,
        optimizer=torch.optim.AdamW,
        executor="local",
    )
    x = torch.ones(4, 64)
    states = 3 * 64 * 64 * 4  # the parameter and two averages, in shards of whole pages
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OffloadSpace, match=f"needs {states:,} bytes more"):
        made.step(x, x)
    monkeypatch.undo()
    assert asked == [states]
    made.step(x, x)


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from graphshard.errors import OffloadFileLimit; from graphshard.runtime.nvme import Disk\n"
        "disk = Disk(sys.argv[1], torch.device('cpu'))\n"
        "try: disk.reserve({1 << 22: 1})\n"
        "except OffloadFileLimit as error: print(error)\n"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], preexec_fn=limit, capture_output=True, text=True, check=True
    )
    assert "must hold 4,194,304 bytes, more than the file size limit (ulimit -f) of 1,048,576 bytes" in ran.stdout


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda *_: 0, "short read at byte 0: 0 of 4096 bytes"),
        (lambda *_: 100, "short read at byte 0: 100 of 4096 bytes"),
    ],
)
def test_a_short_read(disk: Disk, monkeypatch: pytest.MonkeyPatch, call: Callable[..., int], says: str) -> None:
    region = disk.allocate(ALIGN)
    disk.write(torch.zeros(ALIGN // 4), region).wait()
    monkeypatch.setattr(os, "preadv", call)
    with pytest.raises(OffloadFailed, match=says):
        disk.read(region, torch.empty(ALIGN // 4)).wait()


def test_a_read_in_two_parts_is_whole(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    value, region = torch.rand(4 * ALIGN), disk.allocate(16 * ALIGN)
    disk.write(value, region).wait()
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, parts, at: real(file, [parts[0][:ALIGN]], at))
    found = torch.empty_like(value)
    disk.read(region, found).wait()
    assert torch.equal(found, value)


def test_a_disk_that_fails(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    region = disk.allocate(ALIGN)
    monkeypatch.setattr(os, "pwritev", broken)
    with pytest.raises(OffloadFailed, match="failed: write at byte 0: Input/output error"):
        disk.write(torch.zeros(ALIGN // 4), region).wait()


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from graphshard.runtime.nvme import Disk\n"
        "disk = Disk(sys.argv[1], torch.device('cpu'))\n"
        "value = torch.ones(1 << 24); region = disk.allocate(value.nbytes)\n"
        "transfer = disk.write(value, region); print('writing', flush=True)\n"
        "while True: disk.write(value, region).wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert not list(tmp_path.iterdir())
