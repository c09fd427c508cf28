"""`sample`: one pass from logits to (token, logprob), greedy and sampled rows side by side."""

import torch
from torch import Tensor

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.sampling import naive, native

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor,
    stream: int | Tensor,
    sample_index: int | Tensor = 0,
    position: int | Tensor,
    greedy: bool | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws one token a row and gives its logprob.

    Every parameter is one number for all rows or a tensor that broadcasts to `logits.shape[:-1]`.

    Args:
        logits: [..., V] fp32, bf16, fp16 or fp64; V at most 2^22. Not differentiated.
        temperature: >= 0. 0 means greedy, with the logprob at temperature 1.
        top_k: keep the k likeliest tokens; 0 keeps all. Of tokens equal at the threshold the lowest indices stay.
        top_p: in [0, 1]: then keep the smallest set of the likeliest tokens whose share of the mass that top_k left
            reaches top_p, at least one token; equal tokens enter by index. 1 keeps all.
        min_p: in [0, 1]: then drop tokens with less than min_p times the likeliest token's probability. 0 keeps all.
        seed, stream: any int64. sample_index, position: in [0, 2^32). The draw is a function of these four, the row and
            its parameters alone: not of the batch, the slot, the device's thread count or the backend.
        greedy: bool [...]: these rows take their likeliest token (ties: the lowest index) at their own temperature.

    Returns:
        token int64 [...] and logprob fp32 [...]: the log-softmax of logits / temperature over the whole vocabulary, not
        of the filtered distribution, so that it equals what training recomputes. A row that is all -inf, or holds a NaN
        or +inf, gives token 0 and logprob NaN.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value, by the argument's name. Values of tensors are
            checked on the CPU, and on CUDA with RLHF_KERNELS_CHECK=1.

    Source: inverse transform sampling over fixed-point weights, Philox4x32-10 (Salmon et al., 2011); top-p: Holtzman et
    al., 2020; min-p: Nguyen et al., 2024.
    """
    if not isinstance(logits, Tensor) or logits.dtype not in FLOATS:
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits must be a fp32, bf16, fp16 or fp64 tensor, got {got}")
    if logits.dim() == 0 or not 1 <= logits.shape[-1] <= naive.LARGEST_VOCABULARY:
        shape = tuple(logits.shape)
        raise ValueError(f"logits must be [..., V] with 1 <= V <= {naive.LARGEST_VOCABULARY}, got shape {shape}")
    shape = logits.shape[:-1]
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = [
        _per_row("temperature", temperature, logits, exact),
        _per_row("top_k", top_k, logits, torch.int64),
        _per_row("top_p", top_p, logits, torch.float64),
        _per_row("min_p", min_p, logits, torch.float64),
        _per_row("seed", seed, logits, torch.int64),
        _per_row("stream", stream, logits, torch.int64),
        _per_row("sample_index", sample_index, logits, torch.int64),
        _per_row("position", position, logits, torch.int64),
        _per_row("greedy", False if greedy is None else greedy, logits, torch.bool),
    ]
    token, logprob = _sample(logits.detach().reshape(shape.numel(), logits.shape[-1]), *rows)
    return token.view(shape), logprob.view(shape)


def sample_known(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    greedy: Tensor,
    **numbers: Tensor,
) -> tuple[Tensor, Tensor]:
    """`sample` of [n, V] for parameters that are known to be right: [n] each, of the types that `sample` converts to
    (temperature any float); a filter that is off is a number. Checking them would take as long as drawing."""
    if registry.choose("sample", logits) != "native":
        return sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, greedy=greedy, **numbers)
    n = (len(logits),)
    heat = temperature.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    still = heat == 0
    if not isinstance(top_k, Tensor):
        top_k = torch.full(n, top_k, device=logits.device)
    if not isinstance(top_p, Tensor):
        top_p = torch.full(n, top_p, dtype=torch.float64, device=logits.device)
    if not isinstance(min_p, Tensor):
        min_p = torch.full(n, min_p, dtype=torch.float64, device=logits.device)
    cut = -min_p.log().float()
    order = (numbers[name] for name in ("seed", "stream", "sample_index", "position"))
    return native.sample(logits, heat.masked_fill(still, 1.0), top_k, top_p, cut, *order, greedy | still)


def _per_row(name: str, value: bool | float | Tensor, logits: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` as a contiguous tensor of one `dtype` element a row."""
    shape = logits.shape[:-1]
    if not isinstance(value, Tensor):
        fits = {torch.bool: bool, torch.int64: int}.get(dtype, (int, float))
        if not isinstance(value, fits) or (dtype != torch.bool and isinstance(value, bool)):
            wanted = {torch.bool: "a bool", torch.int64: "an int"}.get(dtype, "a number")
            raise TypeError(f"{name} must be {wanted} or a tensor, got {value!r}")
        if dtype == torch.int64 and not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} must fit in 64 bits, got {value}")
        return torch.full((shape.numel(),), value, dtype=dtype, device=logits.device)
    kinds = {torch.bool: value.dtype == torch.bool, torch.int64: _is_integer(value.dtype)}
    if not kinds.get(dtype, value.dtype.is_floating_point or _is_integer(value.dtype)):
        wanted = {torch.bool: "bool", torch.int64: "an integer type"}.get(dtype, "a floating type")
        raise TypeError(f"{name} must have {wanted}, got {value.dtype}")
    if value.device != logits.device:
        raise ValueError(f"{name} is on {value.device}, logits on {logits.device}: they must share a device")
    try:
        return value.detach().to(dtype).expand(shape).reshape(-1).contiguous()
    except RuntimeError:
        raise ValueError(f"{name} must broadcast to {tuple(shape)}, got shape {tuple(value.shape)}") from None


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _check_values(named: dict[str, tuple[Tensor, Tensor, str]]) -> None:
    for name, (values, good, rule) in named.items():
        if not bool(good.all()):
            row = int((~good).nonzero()[0])
            raise ValueError(f"{name} must be {rule}, got {values[row].item()} in row {row}")


@torch.library.custom_op("rlhf_kernels::sample", mutates_args=())
def _sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    stream: Tensor,
    sample_index: Tensor,
    position: Tensor,
    greedy: Tensor,
) -> tuple[Tensor, Tensor]:
    if registry.checks_values(logits):
        word = "in [0, 2^32)"
        _check_values(
            {
                "temperature": (temperature, (temperature >= 0) & temperature.isfinite(), "finite and >= 0"),
                "top_k": (top_k, top_k >= 0, ">= 0 (0: off)"),
                "top_p": (top_p, (top_p >= 0) & (top_p <= 1), "in [0, 1]"),
                "min_p": (min_p, (min_p >= 0) & (min_p <= 1), "in [0, 1]"),
                "sample_index": (sample_index, (sample_index >= 0) & (sample_index < 1 << 32), word),
                "position": (position, (position >= 0) & (position < 1 << 32), word),
            }
        )
    if logits.shape[0] == 0:
        return greedy.new_empty(0, dtype=torch.int64), logits.new_empty(0, dtype=torch.float32)
    greedy = greedy | (temperature == 0)
    temperature = torch.where(temperature == 0, 1.0, temperature)
    min_p_cut = -min_p.log().float()
    backend = native.sample if registry.choose("sample", logits) == "native" else naive.sample
    return backend(logits, temperature, top_k, top_p, min_p_cut, seed, stream, sample_index, position, greedy)


@_sample.register_fake
def _(logits: Tensor, *row_parameters: Tensor) -> tuple[Tensor, Tensor]:
    n = logits.shape[0]
    return logits.new_empty(n, dtype=torch.int64), logits.new_empty(n, dtype=torch.float32)
