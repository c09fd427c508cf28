"""The shim that runs CUDA kernels on the CPU: block and warp operations as on a GPU, and mistakes it must notice."""

import cuda_host
import pytest
import torch

pytestmark = pytest.mark.skipif(cuda_host.compiler_missing(), reason=f"{cuda_host.COMPILER} is not installed")


@pytest.fixture(scope="module")
def examples():
    return cuda_host.Library(cuda_host.compile_library("shim_examples.cpp"))


def test_barriers_and_shared_memory_make_a_scan(examples):
    values, out = torch.randint(100, (3, 64), dtype=torch.int32), torch.zeros(3, 64, dtype=torch.int32)
    examples.call("run_scan", values, out)
    assert torch.equal(out, values.cumsum(1).int())


def test_dynamic_shared_memory(examples):
    values, out = torch.randn(100, dtype=torch.float64), torch.zeros(100, dtype=torch.float64)
    examples.call("run_reversed", values, out)
    assert torch.equal(out, values.flip(0))


def test_warp_operations(examples):
    out = torch.zeros(8 * 33, dtype=torch.int32)
    examples.call("run_warp_operations", out)
    lanes = out[: 8 * 32].reshape(32, 8)
    for lane, found in enumerate(lanes.tolist()):
        up = lane - 4 if lane % 16 >= 4 else lane
        down = min(lane + 4, 31) if lane + 4 < 32 else lane
        votes = sum(1 << k for k in range(0, 32, 3))
        expected = [30, down, up, lane ^ 5, votes, 100 + (lane ^ 1) if lane < 8 else -1, sum(range(lane)), 1]
        assert found == expected, lane
    assert out[-8] == sum(range(32))


def test_a_barrier_that_some_threads_never_reach_is_an_error(examples):
    expected = r"16 \(first: thread 48\) at __shfl_sync .*; 48 \(first: thread 0\) at __syncthreads"
    with pytest.raises(cuda_host.KernelError, match=expected):
        examples.call("run_most_of_a_barrier", torch.zeros(1, dtype=torch.int32))


def test_a_lane_that_its_own_mask_leaves_out_is_an_error(examples):
    with pytest.raises(cuda_host.KernelError, match=r"__syncwarp .*a lane not in its mask"):
        examples.call("run_a_lane_not_in_its_mask")


def test_a_shuffle_whose_lanes_never_come_is_an_error(examples):
    with pytest.raises(cuda_host.KernelError, match=r"16 \(first: thread 0\) at __shfl_down_sync .*16 .*at its end"):
        examples.call("run_lanes_that_never_come", torch.zeros(16, dtype=torch.int32))


def test_shared_memory_starts_as_nan_in_every_block(examples):
    out = torch.zeros(2, dtype=torch.float64)
    examples.call("run_unwritten", out)
    assert out[0] == 1
    assert out[1].isnan()


def test_a_missing_barrier_shows_when_threads_run_in_the_other_order(examples):
    forwards, backwards = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    examples.call("run_without_a_barrier", forwards)
    with examples.backwards():
        examples.call("run_without_a_barrier", backwards)
    assert not torch.equal(forwards, backwards)


def test_blocks_of_a_cluster_write_into_one_anothers_shared_memory(examples):
    out = torch.zeros(8)
    examples.call("run_cluster_sums", out)
    assert out.tolist() == [6.0] * 4 + [22.0] * 4
    with examples.backwards():
        examples.call("run_cluster_sums", out.zero_())
    assert out.tolist() == [6.0] * 4 + [22.0] * 4


CLUSTER_MISTAKES = {
    "run_cluster_without_a_barrier": "before a barrier of the cluster",
    "run_blocks_that_have_ended": "a block that has ended",
    "run_part_of_a_cluster": r"24 \(first: thread 24\) at __syncthreads .*; 40 .*at a barrier of the cluster",
    "run_too_large_a_cluster": "a cluster that CUDA would refuse",
}


@pytest.mark.parametrize(("entry", "message"), CLUSTER_MISTAKES.items(), ids=CLUSTER_MISTAKES)
def test_mistakes_with_clusters_are_errors(examples, entry, message):
    with pytest.raises(cuda_host.KernelError, match=message):
        examples.call(entry, torch.zeros(8))


def test_a_launch_that_cuda_refuses_is_an_error(examples):
    with pytest.raises(cuda_host.KernelError, match="2048 threads"):
        examples.call("run_too_many_threads", torch.zeros(1, dtype=torch.int32))


SEEN = {
    "run_past_the_end": "heap-buffer-overflow",
    "run_past_shared": "heap-buffer-overflow",
    "run_off_its_boundary": "misaligned address",  # a fault on a GPU
    "run_scan": None,
}


@pytest.mark.parametrize("entry", SEEN)
def test_the_sanitizers_see_accesses_outside_global_and_shared_arrays_or_off_their_boundaries(entry):
    done = cuda_host.run_sanitized(
        "shim_examples.cpp",
        "import ctypes\n"
        f"function = ctypes.CDLL(library).{entry}\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype = ctypes.c_void_p\n"
        "array = lambda n: ctypes.c_void_p(libc.malloc(ctypes.c_size_t(n)))\n"
        "arguments = {'run_past_the_end': (array(40), array(4), ctypes.c_int64(10)), 'run_past_shared': (array(4),),\n"
        "             'run_off_its_boundary': (array(64),),\n"
        "             'run_scan': (array(768), array(768))}\n"
        f"function(*arguments['{entry}'])\n"
        "print('ended')\n",
    )
    if SEEN[entry] is None:
        assert done.returncode == 0, done.stderr[-2000:]
        assert "ended" in done.stdout
    else:
        assert SEEN[entry] in done.stderr
        assert "ended" not in done.stdout
