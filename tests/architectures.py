"""Small random decoders of the tested architectures. Norms and biases are perturbed so that they matter."""

import torch
import transformers as T

SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
GATED = {"num_key_value_heads": 2, "intermediate_size": 80}
CONFIGS = {
    "llama": lambda: T.LlamaConfig(**SIZES, **GATED),
    "qwen2": lambda: T.Qwen2Config(**SIZES, **GATED),
    "qwen3": lambda: T.Qwen3Config(**SIZES, **GATED, head_dim=16),
    "mistral": lambda: T.MistralConfig(**SIZES, **GATED, sliding_window=6),
    "gemma2": lambda: T.Gemma2Config(
        **SIZES, **GATED, head_dim=16, sliding_window=6, query_pre_attn_scalar=16,
        attn_logit_softcapping=5.0, final_logit_softcapping=3.0,
    ),
    "gpt2": lambda: T.GPT2Config(
        vocab_size=131, n_embd=48, n_layer=2, n_head=6, n_positions=128, initializer_range=0.15,
        bos_token_id=None, eos_token_id=None,
    ),
    "gpt-neox": lambda: T.GPTNeoXConfig(**SIZES, intermediate_size=80),
}  # fmt: skip
EXTRA = {
    "granite": lambda: T.GraniteConfig(**SIZES, **GATED, logits_scaling=4.0),
    "cohere": lambda: T.CohereConfig(**SIZES, **GATED, logit_scale=0.25),
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> T.PreTrainedModel:
    torch.manual_seed(seed)
    config = (CONFIGS | EXTRA)[name]()
    model = T.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model
