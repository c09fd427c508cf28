"""Bad input raises one clear error by the argument's name, before anything runs, and a failure leaves no trace."""

import pytest
import torch
import transformers
from architectures import GATED, SIZES, build
from generation_models import SLICE, generator, greedy, model, prompts, slice_bytes

from rlhf_kernels.generation import KVBudgetError, SamplingParams, SlicedGenerator

GOOD = SamplingParams(max_new_tokens=4)


@pytest.fixture(scope="module")
def gen():
    return generator(model(), 20)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ([[1, 2], []], ValueError, r"prompts\[1\] is empty"),
        ([[1, 2], [131]], ValueError, r"prompts\[1\] holds token 131; the model's vocabulary is 0 to 130"),
        ([[-1]], ValueError, r"prompts\[0\] holds token -1"),
        ([[1.5]], TypeError, r"prompts\[0\] must be a flat list of token ids"),
        ([[[1], [2]]], TypeError, r"prompts\[0\] must be a flat list"),
        ([[[1], [2, 3]]], TypeError, r"prompts\[0\] must be a flat list"),
        (["text"], TypeError, r"prompts\[0\] must be a flat list"),
        ("text", TypeError, r"prompts must be a list of lists"),
        (5, TypeError, r"prompts must be a list of lists"),
        ([[1] * 125], ValueError, r"prompts\[0\] has 125 tokens.*129.*max_position_embeddings of 128"),
    ],
)
def test_bad_prompts(gen, given, error, words):
    with pytest.raises(error, match=words):
        gen.generate(given, GOOD)


@pytest.mark.parametrize(
    ("params", "streams", "error", "words"),
    [
        ([GOOD], None, ValueError, "params has 1 entries for 2 prompts"),
        ({"n": 2}, None, TypeError, "params must be a SamplingParams"),
        (None, None, TypeError, "params must be a SamplingParams"),
        ([GOOD, 3], None, TypeError, "params must be a SamplingParams"),
        (GOOD, [1], ValueError, "streams has 1 entries for 2 prompts"),
        (GOOD, [1, 2.0], TypeError, r"streams\[1\] is 2.0; it must be an int"),
        (GOOD, [1, 2**63], ValueError, r"streams\[1\] is 9223372036854775808; it must fit in 64 bits"),
    ],
)
def test_bad_params_and_streams(gen, params, streams, error, words):
    with pytest.raises(error, match=words):
        gen.generate([[1, 2], [3]], params, streams=streams)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("max_new_tokens", 0, ValueError),
        ("max_new_tokens", 2.0, TypeError),
        ("temperature", -0.1, ValueError),
        ("temperature", float("nan"), ValueError),
        ("temperature", float("inf"), ValueError),
        ("temperature", "1", TypeError),
        ("temperature", 1e39, ValueError),
        ("temperature", 1e-50, ValueError),
        ("top_k", -1, ValueError),
        ("top_k", True, TypeError),
        ("top_p", 1.1, ValueError),
        ("min_p", -0.5, ValueError),
        ("n", 0, ValueError),
        ("greedy_baseline", 1, TypeError),
        ("ignore_eos", "no", TypeError),
        ("stop_token_ids", 5, TypeError),
        ("stop_token_ids", (-1,), ValueError),
        ("stop_token_ids", (2**40,), ValueError),
        ("stop_token_ids", (1.0,), TypeError),
        ("seed", 2**63, ValueError),
        ("seed", 0.5, TypeError),
    ],
)
def test_bad_sampling_params(field, value, error):
    with pytest.raises(error, match=f"^{field} is "):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_memory": 100}, "kv_memory is 100 bytes"),
        ({"kv_memory": "much"}, "much"),
        ({"kv_memory": "1MiB", "slice_tokens": 0}, "slice_tokens is 0"),
        ({"kv_memory": "1MiB", "max_active": 0}, "max_active is 0"),
        ({"kv_memory": "1MiB", "step_tokens": 0}, "step_tokens is 0"),
    ],
)
def test_bad_generator_options(options, words):
    with pytest.raises(ValueError, match=words):
        SlicedGenerator(model(), **options)


def test_a_model_that_is_none():
    with pytest.raises(TypeError, match="model is a Linear; it must be a HydraModel or a transformers causal LM"):
        SlicedGenerator(torch.nn.Linear(2, 2), "1MiB")


@pytest.mark.parametrize("kind", [transformers.LlamaModel, transformers.LlamaForSequenceClassification])
def test_a_model_without_a_language_modelling_head(kind):
    with pytest.raises(TypeError, match=f"model is a {kind.__name__}, which has no language-modelling head"):
        SlicedGenerator(kind(transformers.LlamaConfig(**SIZES, **GATED)), "1MiB")


def test_a_model_whose_layers_attend_twice_is_refused_before_anything_is_generated():
    lm = transformers.AutoModelForCausalLM.from_config(transformers.DiffLlamaConfig(**SIZES, **GATED))
    gen = generator(lm)
    for _ in range(2):
        with pytest.raises(ValueError, match="its layer 0 attends more than once a step"):
            gen.generate(prompts([5]), GOOD)


def test_a_model_whose_positions_depend_on_the_row_is_refused():
    config = transformers.LlamaConfig(**SIZES, **GATED, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ValueError, match="rope type dynamic"):
        SlicedGenerator(transformers.AutoModelForCausalLM.from_config(config), "1MiB")


def test_a_prompt_over_the_budget_names_the_bytes_before_anything_runs():
    lm = model()
    gen = generator(lm, 5)
    need = -(-(17 + 8 - 1) // SLICE) * slice_bytes(lm)
    with pytest.raises(KVBudgetError, match=rf"prompts\[1\] has 17 tokens.* need {need} bytes.* {gen.kv_memory}"):
        gen.stream(prompts([2, 17]), greedy(max_new_tokens=8))
    assert gen.stats.steps == 0


def test_an_error_in_the_model_leaves_the_generator_usable(monkeypatch):
    lm = model()
    gen = generator(lm, 12)
    want = gen.generate(prompts([9, 20]), GOOD)
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == 5:
            raise RuntimeError("the model broke")

    handle = lm.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="the model broke"):
        gen.generate(prompts([9, 20, 4, 5]), SamplingParams(max_new_tokens=12))
    handle.remove()
    assert lm.config._attn_implementation == "eager"
    assert gen.generate(prompts([9, 20]), GOOD) == want


def test_a_stream_that_is_closed_leaves_the_generator_usable():
    gen = generator(model(), 12)
    want = gen.generate(prompts([9, 20]), GOOD)
    stream = gen.stream(prompts([9, 20, 4]), [greedy(max_new_tokens=n) for n in (2, 9, 9)])
    next(stream)
    stream.close()
    assert gen.generate(prompts([9, 20]), GOOD) == want


def test_an_interrupt_while_reading_a_stream_leaves_the_generator_usable():
    gen = generator(model(), 12)

    def read():
        for _ in gen.stream(prompts([9, 20]), [greedy(max_new_tokens=n) for n in (2, 9)]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read()
    assert len(gen.generate(prompts([9, 20]), GOOD)) == 2


def test_two_streams_of_one_generator_do_not_mix():
    gen = generator(model())
    stream = gen.stream(prompts([9, 20]), [greedy(max_new_tokens=n) for n in (2, 9)])
    next(stream)
    for call in (lambda: gen.generate(prompts([5]), GOOD), gen.sleep):
        with pytest.raises(RuntimeError, match="in the middle of a stream"):
            call()
    assert len(list(stream)) == 1


def test_nan_logits_raise():
    lm = model()
    with torch.no_grad():
        lm.lm_head.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"logits are NaN, first for prompts\[0\]"):
        generator(lm).generate(prompts([5]), GOOD)


def test_an_unknown_role_is_named():
    from rlhf_kernels.nn import HydraModel, LoraSpec

    hydra = HydraModel(
        {"base": build("llama")}, adapters={"actor": LoraSpec(r=2, alpha=2), "critic": LoraSpec(r=2, alpha=2)}
    )
    gen = SlicedGenerator(hydra, "1MiB")
    with pytest.raises(ValueError, match="role is 'player'; the model has actor, critic, reference, reward"):
        gen.generate([[1]], GOOD, role="player")
    with pytest.raises(ValueError, match="role is 'critic', whose head is 'value'"):
        gen.generate([[1]], GOOD, role="critic")
