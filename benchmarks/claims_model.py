"""The models and prompts that the claims are measured on: random Llamas of a given shape, prompts of one length.

Bytes and seconds do not depend on what the weights say. A tokenizer of whole words makes every prompt and every
demonstration exactly as long as asked; the end token is one of the vocabulary, so hardly ever drawn.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROWS = 256  # prompts, and demonstrations


@dataclass(frozen=True)
class Shape:
    """A Llama, and the tokens of a prompt and of a completion. `rank`: of the adapters, on every Linear."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    rank: int
    prompt: int
    response: int

    @property
    def tokens(self) -> int:
        return self.prompt + self.response

    def kv_bytes(self, sequences: int, dtype: str, slice_tokens: int = 16) -> int:
        """Keys and values of so many whole sequences, in whole slices, and one slice more of each."""
        slices = -(-self.tokens // slice_tokens) + 1
        item = getattr(torch, dtype).itemsize
        each = 2 * self.layers * self.kv_heads * (self.width // self.heads) * item
        return sequences * slices * slice_tokens * each

    def write(self, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
        """Checkpoint with a reward head, tokenizer, prompts.jsonl and demonstrations.jsonl in `folder`."""
        from transformers import LlamaConfig, LlamaForCausalLM

        if (folder / "demonstrations.jsonl").is_file():
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        config = LlamaConfig(
            hidden_size=self.width, intermediate_size=self.inner, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, vocab_size=self.vocabulary,
            max_position_embeddings=2 * self.tokens, tie_word_embeddings=False, bos_token_id=None, eos_token_id=1,
            pad_token_id=0, dtype=dtype,
        )  # fmt: skip
        torch.manual_seed(0)
        with _default_dtype(dtype):
            LlamaForCausalLM(config).save_pretrained(folder)
        save_file({"reward.weight": torch.randn(1, self.width) * self.width**-0.5}, folder / "heads.safetensors")
        _tokenizer(self.vocabulary).save_pretrained(folder)
        self._write_rows(folder)
        return folder

    def _write_rows(self, folder: Path) -> None:
        draw = random.Random(0)

        def words(count: int) -> str:
            return " ".join(f"w{draw.randrange(3, self.vocabulary)}" for _ in range(count))

        rows = [{"prompt": words(self.prompt), "completion": words(self.response - 1)} for _ in range(ROWS)]
        prompts = [{"prompt": row["prompt"]} for row in rows]
        for name, content in (("prompts", prompts), ("demonstrations", rows)):
            text = "".join(json.dumps(row) + "\n" for row in content)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


class _default_dtype:
    """New tensors in `dtype` meanwhile: an 8B model is never held in fp32."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.before = dtype, torch.get_default_dtype()

    def __enter__(self) -> None:
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *error: object) -> None:
        torch.set_default_dtype(self.before)


def _tokenizer(vocabulary: int) -> Any:
    """One token a word, words parted by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(3, vocabulary))]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
