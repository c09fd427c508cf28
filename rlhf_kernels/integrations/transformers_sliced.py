"""`attn_implementation="rlhf_kernels_sliced"`: our attention under transformers' own forward, generate and Trainer.

transformers' mask becomes a small int32 tensor [batch, 1, 2, keys], made once a forward: row 0 numbers the sequence
each key belongs to (0: padding, or not written yet), row 1 says how many keys the query there sees, itself included
(0: no query). Whole sequences run through `varlen_attention`, without their padding; new tokens of a cache through
`sliced_attention`, which reads transformers' cache where it lies.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from rlhf_kernels.ops.attention import sliced_attention, varlen_attention

SLICED = "rlhf_kernels_sliced"
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
UNWINDOWED = torch.iinfo(torch.int32).max
REFUSED = {"s_aux": "attention sinks", "position_bias": "position biases", "output_attentions": "attention weights"}


def register() -> Callable[[], None]:
    """Adds the name "rlhf_kernels_sliced" to transformers' registries; returns a function that takes it out again.

    From then on `from_pretrained(..., attn_implementation="rlhf_kernels_sliced")` and `set_attn_implementation` take
    it. No class and no model is changed. Calling it again is harmless.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(SLICED, attend)
    AttentionMaskInterface.register(SLICED, sliced_mask)

    def undo() -> None:
        for registry in (AttentionInterface, AttentionMaskInterface):
            registry._global_mapping.pop(SLICED, None)

    return undo


def sliced_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    config: Any = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """transformers' mask signature -> int32 [batch, 1, 2, kv_length], see the module's docstring.

    `mask_function` is asked about neighbours only: whether a token sees the one before it tells packed sequences
    apart, and whether it sees the one after it tells a pattern that is not causal, which is ValueError.
    """
    kinds = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if kinds or getattr(config, "attention_chunk_size", None):
        raise ValueError(f"model: {SLICED} does not do {', '.join(sorted(kinds)) or 'chunked attention'}")
    if kwargs.get("use_vmap"):
        raise ValueError(f"model: it lays a mask of its own over the causal one, which {SLICED} does not do")
    columns = torch.arange(kv_length, device=device)
    first = q_offset - kv_offset
    real = (columns < first + q_length).expand(batch_size, -1)
    if attention_mask is not None:
        missing = max(0, kv_length + int(kv_offset) - attention_mask.shape[-1])
        padded = torch.nn.functional.pad(attention_mask.to(device=device, dtype=torch.bool), (0, missing))
        real = real & padded[:, columns + kv_offset]
    number = torch.ones(batch_size, kv_length, dtype=torch.int32, device=device)
    if mask_function is not None and q_length > 1:
        begins = _begins(mask_function, batch_size, torch.arange(1, q_length, device=device) + q_offset)
        if not isinstance(first, Tensor) and first == 0:
            number[:, 1:q_length] += begins.cumsum(1, dtype=torch.int32)
        elif bool(begins.any()) and local_size != 1:
            raise ValueError("position_ids: several sequences in a row cannot go on from a cache")
    queries = (columns >= first) & (columns < first + q_length)
    sees = torch.where(queries, UNWINDOWED if local_size is None else local_size, 0).to(torch.int32)
    return torch.stack([number * real, sees.expand(batch_size, -1)], 1)[:, None]


def _begins(mask_function: Callable[..., Tensor], batch_size: int, places: Tensor) -> Tensor:
    """bool [batch, places]: tokens that do not see the one before them."""
    batch = torch.arange(batch_size, device=places.device)[:, None]
    head = torch.zeros((), dtype=torch.long, device=places.device)
    places = places[None]
    if bool(torch.as_tensor(mask_function(batch, head, places - 1, places)).any()):
        raise ValueError(f"model: its attention is not causal, which {SLICED} does not do")
    sees = torch.as_tensor(mask_function(batch, head, places, places - 1))
    return ~sees.expand(batch_size, places.shape[1])


@dataclass
class Layout:
    """What a mask says, in the form the ops take it; the same for every layer of a forward."""

    window: int | None
    tokens: Tensor | None  # int64: which of the batch * queries places hold a token; None: all of them
    borders: Tensor  # int32 [sequences + 1]: where each sequence's tokens begin
    context: Tensor | None = None  # int32 [batch]: keys of each row where a cache goes before the queries, else None
    columns: Tensor | None = None  # int64 [batch, keys]: the places of each row's keys, in order; None: 0, 1, 2, ...


class CacheArena(NamedTuple):
    """One layer of transformers' cache as an arena: views [slices, kv heads, slice_tokens, d] of its tensors."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def layers(self) -> range:
        return range(len(self.keys))

    @property
    def dtype(self) -> torch.dtype:
        return self.keys[0].dtype


_layouts: "WeakIdKeyDictionary" = WeakIdKeyDictionary()  # mask -> Layout, as long as the mask lives


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [B, heads, Q, d], key, value [B, kv heads, K, d] -> [B, Q, heads, d].

    Rows of padding come back as zeros. The window is the mask's. Raises ValueError for what is not computed here.
    """
    if dropout:
        raise ValueError(f"dropout is {dropout}; {SLICED} has none: set the config's attention dropout to 0")
    for name, what in REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"{name}: {SLICED} has no {what}")
    if attention_mask is None or attention_mask.dtype != torch.int32 or attention_mask.shape[1:3] != (1, 2):
        raise ValueError(
            f"attention_mask: {SLICED} takes [batch, tokens] and makes its own mask of it through transformers; "
            f"{type(module).__name__} got {'none' if attention_mask is None else list(attention_mask.shape)}"
        )
    if key.shape[2] != attention_mask.shape[3]:
        raise ValueError(f"key has {key.shape[2]} places; its attention_mask was made for {attention_mask.shape[3]}")
    layout = _layouts.get(attention_mask)
    if layout is None:
        layout = _layouts[attention_mask] = _layout_of(attention_mask, query.shape[2], position_ids)
    # under autocast the rotation leaves q and k in fp32 and v in the low dtype
    query, key = query.to(value.dtype), key.to(value.dtype)
    options = {"scale": scaling, "window": layout.window, "softcap": softcap}
    q = _flat(query, layout.tokens)
    if layout.context is None:
        k, v = (_flat(t[:, :, : query.shape[2]], layout.tokens) for t in (key, value))
        out = varlen_attention(q, k, v, layout.borders, **options)
    else:
        if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
            raise ValueError(f"past_key_values: {SLICED} has no gradient through a cache; use torch.no_grad()")
        arena, table = _as_arena(key, value, layout.columns)
        out = sliced_attention(q, arena, 0, table, layout.context, layout.borders, **options)  # type: ignore[arg-type]
    batch, heads, queries, _ = query.shape
    if layout.tokens is not None:
        out = out.new_zeros(batch * queries, *out.shape[1:]).index_copy(0, layout.tokens, out)
    return out.view(batch, queries, heads, -1), None


def _flat(x: Tensor, tokens: Tensor | None) -> Tensor:
    """[B, heads, T, d] -> [tokens, heads, d]."""
    rows = x.transpose(1, 2).flatten(0, 1)
    return rows if tokens is None else rows[tokens]


def _layout_of(mask: Tensor, queries: int, position_ids: Tensor | None) -> Layout:
    number, sees = mask[:, 0, 0], mask[:, 0, 1]
    batch = number.shape[0]
    first = int((sees[0] > 0).int().argmax())
    window = int(sees[0, first])
    mine = number[:, first : first + queries]
    real = mine > 0
    tokens = None if bool(real.all()) else real.flatten().nonzero()[:, 0]
    layout = Layout(None if window == UNWINDOWED else window, tokens, torch.empty(0))
    if first == 0:
        places = torch.arange(batch * queries, device=mask.device) if tokens is None else tokens
        rows = places // queries
        sequence = mine.flatten()[places].long() + rows * (queries + 1)
        starts = torch.ones_like(sequence, dtype=torch.bool)
        starts[1:] = sequence[1:] != sequence[:-1]
        _check_positions(position_ids, starts, places, batch, queries)
        ends = torch.tensor([places.numel()], device=mask.device)
        layout.borders = torch.cat([starts.nonzero()[:, 0], ends]).int()
        inside = ~starts[1:] & (places.diff() != 1)
    else:
        layout.borders = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()
        layout.context = (number > 0).sum(1, dtype=torch.int32)
        if not bool((number[:, : first + queries] > 0).all()):
            layout.columns = (number == 0).int().argsort(stable=True, dim=1)
        inside = ((number > 0).int().diff(dim=1) != 0).sum(1) > 1 + (number[:, -1] == 0).int()
    if layout.window is not None and bool(inside.any()):
        raise ValueError(
            "attention_mask: it leaves out tokens inside a sequence, which a sliding window does not allow"
        )
    return layout


def _check_positions(position_ids: Tensor | None, starts: Tensor, places: Tensor, batch: int, queries: int) -> None:
    """ValueError for positions that start again inside what the mask holds for one sequence."""
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] != queries:
        return
    positions = position_ids.expand(batch, -1).flatten()[places]
    if bool((~starts[1:] & (positions.diff() <= 0)).any()):
        raise ValueError(
            "position_ids: they start again inside a row, which then holds several sequences; transformers tells them "
            "apart only without attention_mask and without a cache: pass attention_mask=None and use_cache=False"
        )


def _as_arena(key: Tensor, value: Tensor, columns: Tensor | None) -> tuple[CacheArena, Tensor]:
    """A cache layer where it lies, and the slice table of its rows.

    Rows whose keys begin at their first place are one slice each. Others, and all on a GPU (whose kernels are compiled
    for a slice's size, which would grow each step), are slices of one token: a slice is then a place in the storage.
    """
    batch, heads, keys, _ = key.shape
    if columns is None and key.device.type == "cpu":
        return CacheArena([key], [value]), torch.arange(batch, dtype=torch.int32)[:, None]
    row = heads * keys  # from one row of the batch to the next, in tokens of one head
    places = (batch - 1) * row + keys
    views = []
    for tensor in (key.contiguous(), value.contiguous()):
        d = tensor.shape[3]
        views.append(tensor.as_strided((places, heads, 1, d), (d, keys * d, d, 1)))
    if columns is None:
        columns = torch.arange(keys, device=key.device).expand(batch, -1)
    table = columns + torch.arange(batch, device=key.device)[:, None] * row
    return CacheArena(views[:1], views[1:]), table.int()
