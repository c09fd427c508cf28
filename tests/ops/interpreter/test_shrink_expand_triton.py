"""The benchmarks' own shrink and expand kernels, a peer of `lora_linear` on GPUs, compute what they are timed for."""

import pytest
import torch

from benchmarks.lora_triton import EXPAND_N, SHRINK_K, add_expanded, shrink


@pytest.mark.parametrize(("width", "out"), [(32, 48), (SHRINK_K + 40, EXPAND_N + 7)])
@pytest.mark.parametrize("r", [8, 64])
def test_rows_get_their_own_adapters_product(device, width, out, r):
    index = torch.tensor([2, -1, 0, 2, 1], device=device)
    x, a = torch.randn(5, width, device=device), torch.randn(3, r, width, device=device) / width**0.5
    b, y = torch.randn(3, out, r, device=device), torch.randn(5, out, device=device)
    expected = y + 0.5 * torch.stack([b[e] @ (a[e] @ row) if e >= 0 else 0 * y[0] for e, row in zip(index.tolist(), x)])
    found = add_expanded(y.clone(), shrink(x, a, index), b, index, 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(found[1], y[1])
