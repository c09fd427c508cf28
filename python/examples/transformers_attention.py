"""transformers' own model, forward, generate and backward on this library's attention, with padding."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_kernels.integrations.transformers import register
from rlhf_trainer.demo import checkpoint_path

undo = register()
ours, sdpa = (
    AutoModelForCausalLM.from_pretrained(checkpoint_path(), dtype=torch.float32, attn_implementation=name).eval()
    for name in ("rlhf_kernels_sliced", "sdpa")
)
tokenizer = AutoTokenizer.from_pretrained(checkpoint_path(), padding_side="left")
batch = tokenizer(["The function returns", "If", "A class is a"], padding=True, return_tensors="pt")
inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}

answers = [model.generate(**inputs, max_new_tokens=12, do_sample=False) for model in (ours, sdpa)]
for text in tokenizer.batch_decode(answers[0], skip_special_tokens=True):
    print(text)
assert torch.equal(*answers)

labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
losses = [model(**inputs, labels=labels).loss for model in (ours, sdpa)]
for loss in losses:
    loss.backward()
grads = [model.get_input_embeddings().weight.grad for model in (ours, sdpa)]
print(f"loss {losses[0]:.5f}, sdpa's {losses[1]:.5f}")
assert torch.allclose(*losses, atol=1e-5)
assert torch.allclose(*grads, atol=1e-5)
undo()
