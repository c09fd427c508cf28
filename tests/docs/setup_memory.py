"""The shape of Llama-2-7B, without weights."""

from material import llama_2_7b

llama_2_7b("path/to/llama-2-7b")
