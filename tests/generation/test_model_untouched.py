"""The model is lent: after a call, an error or a closed stream it is as it was, and new weights are used at once."""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from architectures import GATED, SIZES, build
from generation_models import NAMES, generator, greedy, model, prompts
from torch import nn

from rlhf_kernels.generation import KVBudgetError, SlicedGenerator
from rlhf_kernels.generation.graphs import SWITCH
from rlhf_kernels.nn import HydraModel, LoraSpec
from rlhf_kernels.nn.lora import lora_layers

GIVEN = prompts([9, 20, 4, 5])
PARAMS = [greedy(max_new_tokens=n) for n in (7, 2, 9, 4)]
HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


def hydra(name: str = "llama") -> HydraModel:
    adapters = {"actor": LoraSpec(r=4, alpha=8), "critic": LoraSpec(r=3, alpha=3)}
    hydra_model = HydraModel({"base": build(name)}, adapters=adapters)
    for layer in lora_layers(hydra_model).values():
        nn.init.normal_(layer.lora_B["actor"], std=0.1)
    return hydra_model


def of_kind(kind: str) -> nn.Module:
    return hydra() if kind == "hydra" else model(kind)


def state(lm: nn.Module) -> dict:
    """Everything about a model that a caller could find changed."""
    found = {}
    for path, module in lm.named_modules():
        config = getattr(module, "config", None)
        found[path] = {
            "type": type(module),
            "training": module.training,
            "attributes": sorted(vars(module)),
            "hooks": {name: list(vars(module)[name]) for name in HOOKS},
            "forward": module.forward.__func__,
            "config": (id(config), config.to_dict(), config._attn_implementation) if config is not None else None,
        }
    for path, tensor in (*lm.named_parameters(), *lm.named_buffers()):
        found[f"tensor {path}"] = (tensor.data_ptr(), tensor._version, tensor.requires_grad, tensor.grad)
    return found


def half_trained(lm: nn.Module) -> nn.Module:
    """A mixture of modes, frozen weights and hooks, as a training loop may have it."""
    lm.train()
    blocks = [module for path, module in lm.named_modules() if path.endswith(("layers.0", "h.0"))]
    blocks[0].eval()
    for i, parameter in enumerate(lm.parameters()):
        parameter.requires_grad_(i % 3 != 0)
    blocks[0].register_forward_hook(lambda *args: None)
    return lm


def whole_call(gen):
    gen.generate(GIVEN, PARAMS)


def closed_stream(gen):
    stream = gen.stream(GIVEN, PARAMS)
    next(stream)
    stream.close()


def forgotten_stream(gen):
    next(gen.stream(GIVEN, PARAMS))


def stream_never_read(gen):
    gen.stream(GIVEN, PARAMS)


def refused_call(gen):
    with pytest.raises(KVBudgetError):
        gen.generate(GIVEN, greedy(max_new_tokens=100))


def broken_call(gen, error=RuntimeError):
    """The third step fails in the model's last layer."""
    steps = []
    last = [m for path, m in gen.model.named_modules() if path.endswith(("layers.1.mlp", "h.1.mlp"))][-1]

    def fail(*args):
        steps.append(args)
        if len(steps) == 3:
            raise error("broken")

    hook = last.register_forward_hook(fail)
    with pytest.raises(error, match="broken"):
        gen.generate(GIVEN, PARAMS)
    hook.remove()


def interrupted_call(gen):
    broken_call(gen, KeyboardInterrupt)


CALLS = [
    whole_call, closed_stream, forgotten_stream, stream_never_read, refused_call, broken_call, interrupted_call,
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "hydra"])
def test_the_model_is_as_it_was(kind, call):
    lm = half_trained(of_kind(kind))
    before = state(lm)
    gen = generator(lm, 28)
    call(gen)
    assert state(lm) == before
    rollouts = gen.generate(GIVEN, PARAMS)
    assert state(lm) == before

    want = generator(of_kind(kind), 28).generate(GIVEN, PARAMS)
    assert [r.tokens for r in rollouts] == [r.tokens for r in want]
    for ours, theirs in zip(rollouts, want):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_between_two_rollouts_of_a_stream_the_model_is_as_it_was():
    lm = half_trained(model("gpt2"))
    before = state(lm)
    for _ in generator(lm, 20).stream(GIVEN, PARAMS):
        assert state(lm) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_model_trains_after_generating_as_if_it_had_not(name):
    ids = torch.tensor(prompts([12]))
    grads = []
    for generates in (False, True):
        lm = model(name)
        if generates:
            generator(lm).generate(GIVEN, PARAMS)
        loss = lm(ids, labels=ids).loss
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in lm.parameters())])
    for ours, plain in zip(*grads):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("static", ["0", "1"], ids=["steps as they come", "static steps"])
@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_call_inside_a_gradient_mode_leaves_the_next_one_right(context, static, monkeypatch):
    monkeypatch.setenv(SWITCH, static)
    lm = model()
    gen = generator(lm)
    want = generator(lm).generate(GIVEN, PARAMS)
    with context():
        assert gen.generate(GIVEN, PARAMS) == want
    assert gen.generate(GIVEN, PARAMS) == want
    stream = gen.stream(GIVEN, PARAMS)
    with context():
        first = next(stream)
        inside = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    assert inside == (context is torch.enable_grad, context is torch.inference_mode)
    assert torch.is_grad_enabled()
    assert sorted([first, *stream], key=lambda r: r.prompt_index) == want


def test_two_generators_on_one_model_take_turns():
    lm = model("qwen2")
    small, large = generator(lm, 20, max_active=2), SlicedGenerator(lm, "2MiB", slice_tokens=16)
    want = large.generate(GIVEN, PARAMS)
    streams = [small.stream(GIVEN, PARAMS), large.stream(GIVEN, PARAMS)]
    found = [[], []]
    while streams[0] is not None or streams[1] is not None:
        for i, stream in enumerate(streams):
            rollout = next(stream, None) if stream is not None else None
            if rollout is None:
                streams[i] = None
            else:
                found[i].append(rollout)
    for rollouts in found:
        assert [r.tokens for r in sorted(rollouts, key=lambda r: r.prompt_index)] == [r.tokens for r in want]


def test_models_that_share_a_config_do_not_disturb_each_other():
    config = transformers.LlamaConfig(**SIZES, **GATED)
    one, other = (transformers.AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    assert one.config is other.config
    ids = torch.tensor(prompts([9]))
    want = other(ids).logits
    stream = generator(one).stream(GIVEN, PARAMS)
    for _ in stream:
        assert torch.equal(other(ids).logits, want)
    packed = HydraModel({"base": other})
    alone = generator(one).generate(GIVEN, PARAMS)
    assert SlicedGenerator(packed, "1MiB").generate(GIVEN, PARAMS) != alone
    assert one.config._attn_implementation == "sdpa"
    assert generator(one).generate(GIVEN, PARAMS) == alone


def test_a_copy_of_a_model_generates_like_it_and_changes_nothing_in_it():
    lm = model()
    gen = generator(lm)
    want = gen.generate(GIVEN, PARAMS)
    twin = copy.deepcopy(lm)
    assert generator(twin).generate(GIVEN, PARAMS) == want
    with torch.no_grad():
        twin.lm_head.weight.neg_()
    assert generator(twin).generate(GIVEN, PARAMS) != want
    assert gen.generate(GIVEN, PARAMS) == want


def by_optimizer(lm, new):
    for p, value in zip(lm.parameters(), new.parameters()):
        p.requires_grad_(True).grad = p.detach() - value.detach()
    torch.optim.SGD(lm.parameters(), lr=1.0).step()


@torch.no_grad()
def in_place(lm, new):
    for p, value in zip(lm.parameters(), new.parameters()):
        p.copy_(value)


def by_new_data(lm, new):
    for p, value in zip(lm.parameters(), new.parameters()):
        p.data = value.data.clone()


def by_loading(lm, new):
    lm.load_state_dict(new.state_dict())


def by_assignment(lm, new):
    lm.load_state_dict(copy.deepcopy(new.state_dict()), assign=True)


@pytest.mark.parametrize("update", [by_optimizer, in_place, by_new_data, by_loading, by_assignment])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "hydra"])
def test_the_next_call_uses_the_weights_of_the_moment(kind, update):
    lm = of_kind(kind)
    gen, other = SlicedGenerator(lm, "1MiB"), of_kind(kind)
    before = gen.generate(GIVEN, PARAMS)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    update(lm, other)
    after = gen.generate(GIVEN, PARAMS)
    want = SlicedGenerator(other, "1MiB").generate(GIVEN, PARAMS)
    assert [r.tokens for r in after] == [r.tokens for r in want]
    assert [r.tokens for r in after] != [r.tokens for r in before]


def test_a_model_that_changes_its_dtype_gets_an_arena_of_that_dtype():
    lm = model()
    gen = SlicedGenerator(lm, "1MiB")
    want = gen.generate(GIVEN, PARAMS)
    lm.bfloat16()
    after = gen.generate(GIVEN, PARAMS)
    assert after == SlicedGenerator(model().bfloat16(), "1MiB").generate(GIVEN, PARAMS)
    assert after != want


def by_parametrization(lm):
    """The module stays, its class and its weight do not."""
    nn.utils.parametrize.register_parametrization(lm.model.layers[0].self_attn.q_proj, "weight", Halved())
    nn.utils.parametrize.register_parametrization(lm.lm_head, "weight", Halved())


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def by_hook(lm):
    lm.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, out: out * 2)
    lm.model.layers[1].input_layernorm.register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))


def by_replacement(lm):
    mlp, attention = lm.model.layers[0].mlp, lm.model.layers[1].self_attn
    mlp.act_fn = nn.GELU()
    torch.manual_seed(5)
    attention.o_proj = nn.Linear(attention.o_proj.in_features, attention.o_proj.out_features, bias=True)
    lm.lm_head = nn.Linear(lm.lm_head.in_features, lm.lm_head.out_features, bias=True)


def by_own_forward(lm):
    mlp = lm.model.layers[0].mlp
    mlp.forward = lambda x: -type(mlp).forward(mlp, x)


def by_adapters(lm):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    peft.inject_adapter_in_model(config, lm)


@pytest.mark.parametrize(
    "change", [by_parametrization, by_hook, by_replacement, by_own_forward, by_adapters], ids=lambda c: c.__name__
)
def test_modules_that_change_between_calls_are_as_they_have_become(change):
    lm = model()
    gen = generator(lm)
    before = gen.generate(GIVEN, PARAMS)
    change(lm)
    lm.eval()
    after = gen.generate(GIVEN, PARAMS)
    assert [r.tokens for r in after] != [r.tokens for r in before]
    for prompt, params, rollout in zip(GIVEN, PARAMS, after):
        ids = torch.tensor([prompt])
        want = lm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=params.max_new_tokens,
            pad_token_id=0,
        )
        assert rollout.tokens == want[0, len(prompt) :].tolist()


def test_a_model_and_its_generator_are_freed_when_nobody_holds_them():
    lm = model()
    gen = generator(lm)
    gen.generate(GIVEN, PARAMS)
    next(gen.stream(GIVEN, PARAMS))
    found = weakref.ref(lm), weakref.ref(gen), weakref.ref(lm.lm_head)
    del lm, gen
    gc.collect()
    assert [ref() for ref in found] == [None] * 3
