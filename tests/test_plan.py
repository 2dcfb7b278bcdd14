"""The plan finds every step, builds each block once and reads no more than it must."""

import concurrent.futures
import hashlib
import itertools
import pickle
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from files import full_disk
from lengths import FIVE_BLOCKS, assert_equal, lengths_from, random_lengths

from cosup_jax.config import Config, DataConfig
from cosup_jax.data import plan as lookup
from cosup_jax.data.blocks import Builder, PlanSettings
from cosup_jax.data.plan import Plan, settings_of
from cosup_jax.dotted import replace_dotted
from cosup_jax.errors import UserError

CONFIG = Config(
    num_epochs=1,
    batch_size=4,
    data=DataConfig(
        **{"max_gen_tokens": 64, "ret_slots": 4, "max_positives": 2, "ctx_rows": 3},
        **{"ctx_row_tokens": 40, "passage_slots": 3},
    ),
)


def store_from(lengths, directory):
    """What a plan reads of a TokenStore."""
    ends = lambda counts: np.concatenate([[0], np.cumsum(counts)])
    return SimpleNamespace(
        **lengths._asdict(),
        **{"gen_offsets": ends(lengths.examples), "ctx_offsets": ends(lengths.passages)},
        **{"fingerprint": "by hand", "directory": directory},
    )


@pytest.fixture
def new_plan(tmp_path, monkeypatch):
    """Makes plans of five blocks an epoch that share one directory."""
    monkeypatch.setattr(lookup, "settings_of", lambda _: FIVE_BLOCKS)
    store = store_from(random_lengths(3), tmp_path)
    return lambda builds_ahead=False: Plan(store, CONFIG, builds_ahead)


def cached(plan):
    """Numbers of the blocks on disk; nothing else may lie there."""
    start = f"plan-{plan.fingerprint[:16]}-"
    names = sorted(path.name for path in plan.store.directory.iterdir())
    assert all(name.startswith(start) and name.endswith(".npz") for name in names), names
    return sorted(int(name.removeprefix(start).removesuffix(".npz")) for name in names)


def no_building(*_):
    raise AssertionError("built again")


def test_steps_are_found_over_block_and_epoch_boundaries(new_plan):
    """An index that is off by one where a block or an epoch ends repeats or skips a step."""
    plan = new_plan()
    counts = [plan._builder.block(*divmod(number, 5)).steps for number in range(15)]
    every = [(number, index) for number, steps in enumerate(counts) for index in range(steps)]
    assert [plan.locate(step) for step in range(len(every))] == every
    backwards = new_plan()
    assert [backwards.locate(step) for step in reversed(range(len(every)))] == every[::-1]
    assert new_plan().total_steps(3) == len(every)
    of_epochs = [sum(counts[first : first + 5]) for first in (0, 5, 10)]
    assert [plan.steps_per_epoch(epoch) for epoch in range(3)] == of_epochs


def test_empty_blocks_are_passed_over(tmp_path, monkeypatch):
    """Far fewer examples fit than are drawn: a block without a step must not hide the next."""
    monkeypatch.setattr(lookup, "settings_of", lambda _: FIVE_BLOCKS)
    lengths = random_lengths(3)
    lengths = lengths._replace(examples=np.where(np.arange(400) < 3, lengths.examples, 99))
    plan = Plan(store_from(lengths, tmp_path), CONFIG, builds_ahead=False)
    assert plan.blocks_per_epoch == 5 and len(plan.left_out) == 397
    found = [plan.locate(step) for step in range(plan.total_steps(2))]
    seen = [plan.block(number).examples.tolist() for number, _ in found]
    assert [len(examples) for examples in seen] == [1] * 6
    assert sorted(itertools.chain(*seen)) == [0, 0, 1, 1, 2, 2]


def test_a_run_builds_its_first_block_alone(new_plan, monkeypatch):
    """Minutes before step 1 while the whole epoch is planned, and again after each restart."""
    plan = new_plan()
    assert plan.locate(0) == (0, 0) and plan.block(0) is plan.block(0)
    assert plan.utilization()["gen_tokens"] > 0.5
    assert cached(plan) == [0]
    last = plan.total_steps(2) - 1
    assert cached(plan) == list(range(10))
    monkeypatch.setattr(Builder, "block", no_building)
    warm = new_plan()
    number, index = warm.locate(last)
    assert number == 9 and not warm._recent, "earlier blocks were read whole"
    assert warm.block(number).steps == index + 1 and warm.total_steps(2) == last + 1
    for block in range(9):
        warm.block(block)
    assert len(warm._recent) <= lookup.KEPT


def test_the_next_block_is_built_ahead(new_plan, monkeypatch):
    """A step that waits while its block is built; a run that plans far beyond where it stands."""
    build, started, go_on = Builder.block, threading.Event(), threading.Event()

    def slow(builder, epoch, block):
        if block:
            started.set()
            assert go_on.wait(20)
        return build(builder, epoch, block)

    monkeypatch.setattr(Builder, "block", slow)
    plan = new_plan(builds_ahead=True)
    first = plan.block(0)
    assert started.wait(20), "nothing is built ahead"
    assert plan.locate(first.steps - 1) == (0, first.steps - 1)
    assert_equal(plan.block(0), first)  # read on while the next is being built
    go_on.set()
    plan._request(1).result(20)
    assert cached(plan) == [0, 1]
    monkeypatch.setattr(Builder, "block", no_building)
    assert plan.locate(first.steps) == (1, 0) and plan.block(1).steps
    with pytest.raises(AssertionError, match="built again"):
        plan.block(2)  # an error ahead is told to the reader who comes there


def test_copies_in_worker_processes_leave_building_ahead_to_the_original(new_plan):
    """Each of eight workers building the same next block takes eight cores from the run."""
    copy = pickle.loads(pickle.dumps(new_plan(builds_ahead=True)))
    copy.block(0)
    assert copy.fingerprint == new_plan().fingerprint and list(copy._recent) == [0]


def race(task):
    """task(0) .. task(7), started together in threads of their own."""
    barrier = threading.Barrier(8)

    def at_once(reader):
        barrier.wait(20)
        return task(reader)

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        return list(threads.map(at_once, range(8)))


@pytest.fixture
def slow_builds(monkeypatch):
    """Every call of Builder.block, which leaves time for others to come."""
    build, calls = Builder.block, []

    def slow(builder, epoch, block):
        calls.append((builder, epoch, block))
        time.sleep(0.01)
        return build(builder, epoch, block)

    monkeypatch.setattr(Builder, "block", slow)
    return calls


def test_threads_and_plans_agree_on_every_step(new_plan, slow_builds):
    """A block that two threads count twice shifts every later step, on one host alone."""
    plans = [new_plan(), new_plan(builds_ahead=True)]
    found = race(lambda reader: [plans[reader % 2].locate(step) for step in range(50)])
    reference = Builder(random_lengths(3), plans[0].shape, FIVE_BLOCKS, CONFIG.seed)
    steps = [reference.block(0, block).steps for block in range(5)]
    assert len(set(steps)) > 1
    every = [(block, index) for block in range(5) for index in range(steps[block])]
    assert all(places == every[:50] for places in found)


def test_threads_build_a_block_once(new_plan, slow_builds, monkeypatch):
    """Readers that race for a block, each building it, make it come eight times as late."""
    monkeypatch.setattr(lookup, "KEPT", 1)  # blocks are forgotten while they are being built
    plans = [new_plan(), new_plan(builds_ahead=True)]
    orders = [np.roll(range(5), reader).tolist() for reader in range(8)]
    found = race(lambda reader: [plans[reader % 2].block(n) for n in orders[reader]])
    assert len(slow_builds) == len(set(slow_builds))
    for order, blocks in zip(orders, found, strict=True):
        for number, block in zip(order, blocks, strict=True):
            assert_equal(block, plans[0]._builder.block(0, number))


def test_a_block_half_written_is_no_block(new_plan, monkeypatch):
    """A run killed while it writes leaves a broken file that every later start trips over."""

    def killed(*_):
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(lookup.os, "replace", killed)
        with pytest.raises(OSError, match="killed"):
            new_plan().block(0)
    assert new_plan().block(0).steps


def test_a_full_disk_is_one_line(new_plan):
    """Bug: a traceback and a temporary file where there is no room for a block."""
    plan = new_plan()
    with full_disk(), pytest.raises(UserError, match=r"cannot write .*: File too large; check"):
        plan.block(0)
    assert cached(plan) == []


def test_a_damaged_block_is_built_again(new_plan):
    """Bug: a file that lost its end, or turned to zeros, stops every later start."""
    expected = new_plan()._builder.block(0, 0)
    for damage in (lambda data: data[:-30], lambda data: bytes(len(data)), lambda data: b""):
        new_plan().block(0)
        path = new_plan()._path(0)
        path.write_bytes(damage(path.read_bytes()))
        assert new_plan().locate(expected.steps) == (1, 0)
        assert_equal(new_plan().block(0), expected)


def test_cached_blocks_are_as_readable_as_other_files(new_plan):
    """Bug: mode 0600, so that a colleague on the same data cannot read the plan."""
    plan = new_plan()
    (plan.store.directory / "plain").touch()
    plain = (plan.store.directory / "plain").stat().st_mode
    plan.block(0)
    assert plan._path(0).stat().st_mode == plain


def test_a_late_resume_opens_few_files(tmp_path, monkeypatch):
    """Bug: 8 examples for 3000 steps are 3000 epochs, and a resumed run reads a file of each."""
    store = store_from(lengths_from([(60, [], [])] * 8, []), tmp_path)
    assert Plan(store, CONFIG, builds_ahead=False).locate(300) == (150, 0)
    opened, load = [], np.load
    monkeypatch.setattr(lookup.np, "load", lambda path: opened.append(path) or load(path))
    resumed = Plan(store, CONFIG, builds_ahead=False)
    assert resumed.locate(300) == (150, 0) and resumed.locate(1) == (0, 1)
    assert len(opened) <= 1 + lookup.COUNTED
    resumed._path("starts").write_bytes(b"damaged")
    assert Plan(store, CONFIG, builds_ahead=False).locate(300) == (150, 0)


@pytest.mark.parametrize(("weight", "enough"), [(0.0001, False), (0.12, False), (0.125, True)])
def test_an_epoch_of_next_to_nothing_is_refused(tmp_path, weight, enough):
    """Bug: source@0.0001 validates, and training looks through empty epochs without end."""
    lengths = lengths_from([(60, [], [])] * 8 + [(99, [], [])] * 8, [])
    lengths = lengths._replace(weights=np.full(16, weight, np.float32))
    plan = Plan(store_from(lengths, tmp_path), CONFIG, builds_ahead=False)
    if enough:
        assert plan.locate(5)
        return
    with pytest.raises(UserError, match=r"an epoch draws 0\.\d+ examples.* raise the weights"):
        plan.locate(0)


def test_misses_follow_the_window():
    """Bug: a step closed too early, or examples tried without end, whatever the window."""
    found = [settings_of(replace_dotted(CONFIG, "data.window", n)).misses for n in (1, 512, 1001)]
    assert found == [1, 64, 126]


def test_fingerprint_names_the_cut_where_there_is_one(new_plan, monkeypatch):
    """An upgrade that refuses every checkpoint of small data, or takes another cut for the same."""
    cut = new_plan()
    monkeypatch.setattr(lookup, "settings_of", lambda _: PlanSettings())
    whole = new_plan()
    before = (
        "(2, 'by hand', 0, BatchShape(B=4, T=64, R=4, S=2, U=3, L=40, P=3), PlanSettings("
        "packing=True, aligned=False, pure=False, buckets=1, window=512, misses=64))"
    )
    assert whole.fingerprint == hashlib.sha256(before.encode()).hexdigest()
    assert cut.shape == whole.shape and cut.fingerprint != whole.fingerprint
