"""How transformers generates: `generate` on static batches, and its continuous batching.

A static batch is padded on the left to its longest prompt and runs to its longest completion; what a prompt did not
want is thrown away and does not count. Continuous batching is what `generate_batch` runs, asked prompt by prompt, since
`generate_batch` itself takes one length for all. Both sample from the whole distribution at temperature 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.case import Prepare, Run
from benchmarks.generation_work import Draws, own_copy
from benchmarks.peers import attribute

GENERATE = "generate, batch"  # how the names of those begin that a user can run
TOLD = "generate told the lengths"
CONTINUOUS = "continuous batching"
DEFAULTS = " at its defaults"
PAGE_TOKENS = 16  # tried 16 to 256: on the CPU no difference, and small ones waste no bytes
BATCH_TOKENS = {"cpu": 512, "cuda": 8192}  # of continuous batching's steps; tried 128 to 1024 on the CPU
WARM_TOKENS = 2
TAKEN_S = 60  # without a result for so long continuous batching is taken to hang


@dataclass(frozen=True)
class Static:
    """`prompts` of them in batches of `batch`, as they come or sorted: by prompt, or by the length each will have,
    which nobody knows who waits for an end-of-sequence token."""

    batch: int
    prompts: int
    sort: Literal["", "prompt", "length"] = ""
    compiled: bool = False  # a static cache, whose decode step transformers compiles on a GPU

    def name(self, of: int) -> str:
        told = f"{TOLD}, batch" if self.sort == "length" else GENERATE
        parts = [f"{told} {self.batch}"]
        parts += ["sorted by prompt"] if self.sort == "prompt" else []
        parts += ["compiled"] if self.compiled else []
        return ", ".join(parts) + subset(self.prompts, of)

    def order(self, draws: Draws) -> Draws:
        draws = draws.first(self.prompts)
        if not self.sort:
            return draws
        size = [len(prompt) for prompt in draws.prompts] if self.sort == "prompt" else draws.new
        return draws.ordered(sorted(range(len(size)), key=size.__getitem__))

    def contestant(self, model: Any, draws: Draws) -> Prepare:
        def prepare() -> Run:
            ordered = self.order(draws)
            starts = range(0, len(ordered.prompts), self.batch)
            batches = [Draws(ordered.prompts[i : i + self.batch], ordered.new[i : i + self.batch]) for i in starts]
            generate_batch(model, batches[0], self.compiled, most=WARM_TOKENS)
            return lambda: [generate_batch(model, batch, self.compiled) for batch in batches]

        return prepare


def subset(prompts: int, of: int) -> str:
    return f" ({prompts} prompts)" if prompts < of else ""


@torch.no_grad()
def generate_batch(model: Any, batch: Draws, compiled: bool = False, most: int | None = None) -> list[list[int]]:
    """Each prompt's wanted tokens. `most` stops earlier, with the same shapes."""
    width, longest = max(map(len, batch.prompts)), max(batch.new)
    ids = torch.zeros(len(batch.prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(batch.prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    config = sampling(max_new_tokens=longest, cache_implementation="static" if compiled else None)

    def stop(so_far: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(so_far),), so_far.shape[1] - width >= (most or 0), device=so_far.device)

    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
        stopping_criteria=[stop] if most else None,
    )
    made = out[:, width:].tolist()
    assert all(len(row) == min(longest, most or longest) for row in made)
    return [row[:new] for row, new in zip(made, batch.new)]


def sampling(**changes: Any) -> Any:
    """transformers' configuration for the whole distribution at temperature 1, without an end."""
    return attribute("transformers", "GenerationConfig")(do_sample=True, top_k=0, top_p=1.0, pad_token_id=0, **changes)


@dataclass(frozen=True)
class Continuous:
    """`prompts` of them, at most `active` at a time, in `kv_tokens` tokens of cache; or all as it is by default.

    By default its cache takes most of the machine's free memory, or `memory_share` of it.
    """

    active: int
    prompts: int
    kv_tokens: int
    tuned: bool = True
    memory_share: float | None = None

    def name(self, of: int) -> str:
        how = f", {self.active} active" if self.tuned else DEFAULTS
        return f"{CONTINUOUS}{how}{subset(self.prompts, of)}"

    def contestant(self, model: Any, draws: Draws) -> Prepare:
        def prepare() -> Run:
            own = own_copy(model)  # its attention is switched
            mine = draws.first(self.prompts)
            self.run(own, Draws(mine.prompts[: self.active], [WARM_TOKENS] * min(self.active, len(mine.new))))
            return lambda: self.run(own, mine)

        return prepare

    def run(self, model: Any, draws: Draws) -> dict[str, int]:
        """How many tokens each request got."""
        found: dict[str, int] = {}
        with self._manager(model) as manager:
            for i, (prompt, new) in enumerate(zip(draws.prompts, draws.new)):
                manager.add_request(prompt, request_id=str(i), max_new_tokens=new)
            while len(found) < len(draws.prompts):
                result = manager.get_result(timeout=TAKEN_S)
                if result is None or result.error is not None:
                    raise RuntimeError("ended without a result" if result is None else str(result.error))
                if result.is_finished():
                    found[result.request_id] = len(result.generated_tokens)
        assert [found[str(i)] for i in range(len(draws.new))] == draws.new
        return found

    @contextmanager
    def _manager(self, model: Any) -> Iterator[Any]:
        """Tuned: prompts share nothing here, so looking for shared blocks would only cost."""
        config = attribute("transformers.generation.configuration_utils", "ContinuousBatchingConfig")(
            auto_switch_to_flash=find_spec("flash_attn") is not None,  # else it looks for kernels on the network
            **(self._tuning(model.device.type) if self.tuned else {"max_memory_percent": self.memory_share}),
        )
        options = sampling(max_new_tokens=1, eos_token_id=-1)
        with (
            torch.no_grad(),
            model.continuous_batching_context_manager(
                generation_config=options, continuous_batching_config=config, timeout=5
            ) as manager,
        ):
            yield manager

    def _tuning(self, device: str) -> dict[str, Any]:
        return {
            "page_size": PAGE_TOKENS,
            "num_blocks": -(-self.kv_tokens // PAGE_TOKENS),
            "max_batch_tokens": BATCH_TOKENS[device],
            "max_requests_per_batch": self.active,
            "allow_block_sharing": False,
        }
