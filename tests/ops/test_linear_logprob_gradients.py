"""linear_logprob's derivatives: gradcheck of every output, what may be absent, and what is an error."""

import pytest
import torch

from rlhf_kernels.ops.logprob import linear_logprob


@pytest.mark.parametrize("save", ["grad_vector", "recompute"])
def test_a_second_derivative_is_an_error_and_not_a_wrong_number(save):
    hidden = torch.randn(4, 8, requires_grad=True)
    out = linear_logprob(hidden, torch.randn(10, 8), torch.arange(4), save=save)
    (grad,) = torch.autograd.grad(out.logprob.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(grad.sum(), hidden)
