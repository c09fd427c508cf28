"""Log-probabilities, entropy and divergences of the language-model head."""

from rlhf_kernels.ops.logprob.api import linear_logprob
from rlhf_kernels.ops.logprob.logits import logprob
from rlhf_kernels.ops.logprob.outputs import LinearLogprobOutput, LogprobOutput

__all__ = ["LinearLogprobOutput", "LogprobOutput", "linear_logprob", "logprob"]
