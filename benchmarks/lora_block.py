"""A whole Llama block (attention, gated MLP, norms) with adapters on its seven linears, and who runs it.

Every contestant has the same weights, adapters and input; the attention is transformers' own, through torch's
`scaled_dot_product_attention`. One adapter: all rows use it. Two, as Hydra's actor and critic: the first half of the
sequences uses one, the second half the other, which takes PEFT two passes.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import OURS, Check, Prepare, Unavailable
from benchmarks.lora_layer import BF16, PRECISION, SCALING, taken
from benchmarks.peers import attribute
from rlhf_kernels.ops.lora import Routing

FROZEN_BLOCK = "frozen block"
OURS_LOW = f"{OURS}, bf16 adapters"
ACCELERATED = "PEFT + accelerate()"
ROUTED = "PEFT + accelerate(), route()"
PEFT = "PEFT"
PEFT_LOW = "PEFT, bf16 adapters"
ACTOR, CRITIC = "actor", "critic"
LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
LOSS_ERROR, GRADIENT_ERROR = 1e-6, 1e-5  # of fp32 ones, relative to PEFT's

Step = Callable[[], tuple[list[Tensor], list[Tensor | None]]]  # -> the outputs; gradients of their x, of A and B


@dataclass(frozen=True)
class Block:
    width: int
    inner: int
    heads: int
    kv_heads: int
    sequences: int = 4
    tokens: int = 256  # of each sequence
    r: int = 16
    adapters: tuple[str, ...] = (ACTOR,)
    dtype: torch.dtype = BF16

    def text(self) -> str:
        rows = self.sequences * self.tokens
        return f"{rows} x {self.width} x {self.inner}, r={self.r}, {PRECISION[self.dtype]}"

    def tiny(self) -> "Block":
        return replace(
            self, width=64, inner=96, heads=4, kv_heads=2, tokens=8, sequences=min(self.sequences, 4), r=min(self.r, 4)
        )


@dataclass
class BlockInputs:
    block: Block
    model: Any  # LlamaModel of one layer, frozen; never run or changed itself
    positions: tuple[Tensor, Tensor]  # cos and sin
    x: tuple[Tensor, ...]  # [sequences of the adapter, tokens, width] a pass, each a leaf
    whole: Tensor  # all of them, a leaf
    upstream: Tensor  # as `whole`
    matrices: dict[tuple[str, str], tuple[Tensor, Tensor]]  # (adapter, linear) -> A, B in fp32

    def parts(self) -> list[slice]:
        """The sequences of each adapter."""
        each = self.block.sequences // len(self.block.adapters)
        return [slice(i * each, (i + 1) * each) for i in range(len(self.block.adapters))]

    def routing(self) -> Routing:
        """Of the rows of `whole`."""
        tokens = self.block.tokens
        runs = [(part.start * tokens, part.stop * tokens, e) for e, part in enumerate(self.parts())]
        return Routing.from_runs(runs, len(self.block.adapters))


def make_block(block: Block, device: str) -> BlockInputs:
    config_class, model_class = attribute("transformers", "LlamaConfig"), attribute("transformers", "LlamaModel")
    config = config_class(
        hidden_size=block.width, intermediate_size=block.inner, num_attention_heads=block.heads,
        num_key_value_heads=block.kv_heads, num_hidden_layers=1, vocab_size=8, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = model_class(config).to(block.dtype).requires_grad_(False).eval()
        whole = torch.randn(block.sequences, block.tokens, block.width, dtype=block.dtype)
        upstream = torch.randn_like(whole)
        cos, sin = model.rotary_emb(whole, torch.arange(block.tokens)[None])
        matrices = {}
        for adapter in block.adapters:
            for name in LINEARS:
                out, width = model.layers[0].get_submodule(name).weight.shape
                down = torch.randn(block.r, width) * width**-0.5
                matrices[adapter, name] = down, torch.randn(out, block.r) * 0.2 * block.r**-0.5
    inputs = BlockInputs(block, model, (cos, sin), (), whole.requires_grad_(), upstream, matrices)
    inputs.x = tuple(whole.detach()[part].requires_grad_() for part in inputs.parts())
    return inputs


def own_model(inputs: BlockInputs) -> Any:
    """A copy that shares the frozen weights."""
    return copy.deepcopy(inputs.model, {id(p): p for p in inputs.model.parameters()})


@dataclass(frozen=True)
class Pass:
    """One forward and backward of a block: x [sequences, tokens, width], the gradient of its output, the block."""

    forward: Callable[[Tensor], Tensor]
    x: Tensor
    upstream: Tensor


def runs(passes: list[Pass], parameters: list[Tensor]) -> Step:
    leaves = (*(p.x for p in passes), *parameters)

    def run() -> tuple[list[Tensor], list[Tensor | None]]:
        outputs = []
        for each in passes:
            y = each.forward(each.x)
            y.backward(each.upstream)
            outputs.append(y.detach())
        return outputs, taken(leaves)

    return run


def forward_of(layer: Any, positions: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x, position_embeddings=positions)


def frozen_block(inputs: BlockInputs) -> Step:
    forward = forward_of(own_model(inputs).layers[0], inputs.positions)
    return runs([Pass(forward, inputs.whole, inputs.upstream)], [])


def ours(inputs: BlockInputs, dtype: torch.dtype | None = None) -> Step:
    """All adapters' rows in one pass; fp32 adapters unless `dtype` says else, as PEFT keeps them by default."""
    from rlhf_kernels.nn.lora import LoraSpec, attach_adapters

    block, model = inputs.block, own_model(inputs)
    spec = LoraSpec(r=block.r, alpha=SCALING * block.r, dtype=dtype)
    routes = attach_adapters(model, dict.fromkeys(block.adapters, spec))
    layer = model.layers[0]
    with torch.no_grad():
        for (adapter, name), (a, b) in inputs.matrices.items():
            linear = layer.get_submodule(name)
            linear.lora_A[adapter].copy_(a)
            linear.lora_B[adapter].copy_(b)
    inside, routing = forward_of(layer, inputs.positions), inputs.routing()

    def forward(x: Tensor) -> Tensor:
        with routes.use(routing):
            return inside(x)

    parameters = [
        side[adapter]
        for adapter, name in inputs.matrices
        for side in (layer.get_submodule(name).lora_A, layer.get_submodule(name).lora_B)
    ]
    return runs([Pass(forward, inputs.whole, inputs.upstream)], parameters)


def peft_model(inputs: BlockInputs, autocast: bool = True) -> tuple[Any, list[Tensor]]:
    """A PeftModel of the block, and A and B of each adapter and linear in the order of `inputs.matrices`."""
    get_peft_model, config_class = attribute("peft", "get_peft_model"), attribute("peft", "LoraConfig")
    block = inputs.block
    names = sorted({name.rpartition(".")[2] for name in LINEARS})
    config = config_class(r=block.r, lora_alpha=SCALING * block.r, target_modules=names)
    first, *others = block.adapters
    model = get_peft_model(own_model(inputs), config, adapter_name=first, autocast_adapter_dtype=autocast)
    for name in others:
        model.add_adapter(name, config, autocast_adapter_dtype=autocast)
    parameters = []
    for (adapter, name), matrices in inputs.matrices.items():
        linear = model.base_model.model.layers[0].get_submodule(name)
        for side, matrix in zip((linear.lora_A, linear.lora_B), matrices):
            side[adapter].weight.data.copy_(matrix)
            parameters.append(side[adapter].weight.requires_grad_())
    return model, parameters


def peft(inputs: BlockInputs, autocast: bool = True, accelerated: bool = False) -> Step:
    """One pass an adapter, switched as PEFT's users switch."""
    block = inputs.block
    model, parameters = peft_model(inputs, autocast)
    if accelerated:
        attribute("rlhf_kernels.integrations.peft", "accelerate")(model)
    inside = forward_of(model.base_model.model.layers[0], inputs.positions)
    if len(block.adapters) == 1:
        return runs([Pass(inside, inputs.whole, inputs.upstream)], parameters)

    def switched(adapter: str) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            model.set_adapter(adapter)
            return inside(x)

        return forward

    passes = zip(block.adapters, inputs.x, inputs.parts())
    return runs([Pass(switched(adapter), x, inputs.upstream[part]) for adapter, x, part in passes], parameters)


def peft_routed(inputs: BlockInputs) -> Step:
    """All adapters' rows in one pass of an accelerated PEFT model."""
    accelerate, route = (attribute("rlhf_kernels.integrations.peft", name) for name in ("accelerate", "route"))
    adapters, routing = inputs.block.adapters, inputs.routing()
    if len(adapters) == 1:
        raise Unavailable("one adapter")
    model, parameters = peft_model(inputs)
    accelerate(model)
    inside = forward_of(model.base_model.model.layers[0], inputs.positions)

    def forward(x: Tensor) -> Tensor:
        with route(model, routing, adapters):
            return inside(x)

    return runs([Pass(forward, inputs.whole, inputs.upstream)], parameters)


CONTESTANTS: dict[str, Callable[[BlockInputs], Step]] = {
    OURS: ours,
    OURS_LOW: lambda inputs: ours(inputs, BF16),
    FROZEN_BLOCK: frozen_block,
    ACCELERATED: lambda inputs: peft(inputs, accelerated=True),
    ROUTED: peft_routed,
    PEFT: peft,
    PEFT_LOW: lambda inputs: peft(inputs, autocast=False),
}


def contestants(block: Block, device: str) -> dict[str, Prepare]:
    inputs = make_block(block, device)

    def prepare(load: Callable[[BlockInputs], Step]) -> Prepare:
        return lambda: load(inputs)

    return {name: prepare(load) for name, load in CONTESTANTS.items()}


def results(inputs: BlockInputs, who: str) -> list[Tensor]:
    """The outputs and the gradients of x, of all passes, then of A and B of each adapter and linear."""
    outputs, gradients = CONTESTANTS[who](inputs)()
    found = [g for g in gradients if g is not None]
    assert len(found) == len(gradients)
    passes = len(outputs)
    return [torch.cat(outputs), torch.cat(found[:passes]), *found[passes:]]


def same_step(block: Block, device: str, who: tuple[str, ...] = (), over: str = PEFT) -> list[Check]:
    """How far each one's loss and gradients are from those of `over`, in fp32 from the same state, on fewer rows.

    The loss is the sum of y times the gradient that the backward starts from; its error is relative to the sum of the
    terms' sizes, a gradient's to its norm.
    """
    who = who or (OURS, ACCELERATED if len(block.adapters) == 1 else ROUTED)
    inputs = make_block(replace(block, dtype=torch.float32, sequences=2, tokens=min(block.tokens, 128)), device)
    y_over, *theirs = results(inputs, over)
    terms = y_over.double() * inputs.upstream
    checks = []
    for name in who:
        y, *mine = results(inputs, name)
        loss = ((y.double() * inputs.upstream).sum() - terms.sum()).abs() / terms.abs().sum()
        worst = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(mine, theirs))
        checks += [
            Check(f"{name}: loss in fp32 against {over}", float(loss), LOSS_ERROR),
            Check(f"{name}: gradients in fp32 against {over}", worst, GRADIENT_ERROR),
        ]
    return checks
