"""BlockPool and PrefixTree: references are counted, a slice is free exactly when nobody leases it or waits for it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from rlhf_kernels._engine import BlockPool, PrefixTree

SLICES = 5


class PoolMachine(RuleBasedStateMachine):
    """Any order of acquire, retain and release against a dictionary of counts."""

    def __init__(self):
        super().__init__()
        self.pool, self.refs, self.peak = BlockPool(SLICES), {}, 0

    @precondition(lambda self: len(self.refs) < SLICES)
    @rule()
    def acquire(self):
        slice_ = self.pool.acquire()
        assert slice_ not in self.refs
        assert 0 <= slice_ < SLICES
        self.refs[slice_] = 1
        self.peak = max(self.peak, len(self.refs))

    @precondition(lambda self: len(self.refs) == SLICES)
    @rule()
    def acquire_from_an_empty_pool(self):
        with pytest.raises(RuntimeError, match="no free slice"):
            self.pool.acquire()

    @rule(slice_=st.integers(0, SLICES - 1))
    def retain(self, slice_):
        if slice_ in self.refs:
            self.pool.retain(slice_)
            self.refs[slice_] += 1
        else:
            with pytest.raises(RuntimeError, match="not leased"):
                self.pool.retain(slice_)

    @rule(slice_=st.integers(0, SLICES - 1))
    def release(self, slice_):
        if slice_ not in self.refs:
            with pytest.raises(RuntimeError, match="not leased"):
                self.pool.release(slice_)
            return
        self.refs[slice_] -= 1
        assert self.pool.release(slice_) == (self.refs[slice_] == 0)
        if self.refs[slice_] == 0:
            del self.refs[slice_]

    @invariant()
    def counts_agree(self):
        assert [self.pool.refs(i) for i in range(SLICES)] == [self.refs.get(i, 0) for i in range(SLICES)]
        assert (self.pool.used, self.pool.free) == (len(self.refs), SLICES - len(self.refs))
        assert self.pool.peak_used == self.peak


TestBlockPool = PoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=60, deadline=None)


def test_a_slice_that_does_not_exist():
    with pytest.raises(IndexError, match="slice 7 does not exist"):
        BlockPool(2).release(7)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), max_size=6), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_prompts_share_nodes_exactly_as_far_as_their_slices_are_equal(prompts, slice_tokens):
    tree = PrefixTree(BlockPool(1), slice_tokens)
    paths = [tree.insert(prompt) for prompt in prompts]
    for prompt, path in zip(prompts, paths):
        assert len(path) == -(-len(prompt) // slice_tokens)
        for other, theirs in zip(prompts, paths):
            for i, (a, b) in enumerate(zip(path, theirs)):
                assert (a == b) == (prompt[: (i + 1) * slice_tokens] == other[: (i + 1) * slice_tokens])


def computed(waiting: int) -> tuple[BlockPool, PrefixTree, list[int]]:
    """A prompt of two slices that one sequence has computed and `waiting` others want."""
    pool = BlockPool(4)
    tree = PrefixTree(pool, 2)
    path = tree.insert([1, 2, 3])
    for node in path:
        for _ in range(waiting + 1):
            tree.expect(node)
        tree.assign(node, pool.acquire(), 0)
        tree.publish(node)
    return pool, tree, path


def test_with_no_one_waiting_slices_return_at_once():
    pool, tree, path = computed(waiting=0)
    for node in path:
        tree.leave(node)
    assert (pool.used, tree.idle) == (0, 0)


def test_what_someone_waits_for_is_kept_until_they_come():
    pool, tree, path = computed(waiting=1)
    for node in path:
        tree.leave(node)
    assert (pool.used, tree.idle) == (2, 2)
    for node in path:
        assert tree.lease(node) == tree.slice(node)
    assert (pool.used, tree.idle) == (2, 0)
    assert not any(tree.held(node) for node in path)


def test_what_is_kept_can_be_evicted_leaves_first():
    pool, tree, path = computed(waiting=1)
    for node in path:
        tree.leave(node)
    assert tree.evict()
    assert [tree.ready(node) for node in path] == [True, False]
    assert tree.evict()
    assert not tree.evict()
    assert pool.used == 0


def test_what_is_leased_cannot_be_evicted():
    pool, tree, path = computed(waiting=2)
    tree.lease(path[0])
    tree.leave(path[0])
    assert not tree.evict()
    assert pool.refs(tree.slice(path[0])) == 2  # the other sequence's, and the tree's for the one that waits


def test_someone_who_stops_waiting_frees_what_was_kept_for_them():
    pool, tree, path = computed(waiting=1)
    for node in path:
        tree.leave(node)
    for node in path:
        tree.forget(node)
    assert pool.used == 0


def test_misuse_is_refused():
    pool, tree, path = computed(waiting=0)
    with pytest.raises(RuntimeError, match="not expected"):
        tree.forget(path[0])
    with pytest.raises(RuntimeError, match="has a slice already"):
        tree.assign(path[0], pool.acquire(), 1)
    fresh = tree.insert([9])[0]
    with pytest.raises(RuntimeError, match="not computed"):
        tree.lease(fresh)
