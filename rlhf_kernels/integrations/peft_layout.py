"""Adapters in PEFT's layout on disk: adapter_config.json beside adapter_model.safetensors. PEFT is not needed.

The tensors' file says in its metadata which base they were trained on (`base_fingerprint`); PEFT passes over it.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from rlhf_kernels.nn.lora import LoraSpec, adapter_routes, decoder_linears, lora_layers
from rlhf_kernels.nn.shards import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT wraps a model twice before it names its modules
FINGERPRINT, FINGERPRINT_VALUES = "base_fingerprint", 256  # key of the metadata; numbers read of each weight


def save_adapter(model: "PreTrainedModel", name: str, directory: Path, fingerprint: str | None = None) -> None:
    """Writes adapter `name` of `model` so that `peft.PeftModel.from_pretrained(base, directory)` loads it.

    fingerprint: of `model`, where it is known.
    """
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.lora_A}
    spec = adapter_routes(model).specs[name]
    tensors = {}
    for path, layer in layers.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A[name].detach().cpu().contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_B[name].detach().cpu().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.config._name_or_path or None,
        "r": spec.r,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(layer.transposed for layer in layers.values()),
        "target_modules": _shortest_names(model, list(layers)),
        "inference_mode": True,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_file(
        tensors, directory / WEIGHTS, metadata={"format": "pt", FINGERPRINT: fingerprint or base_fingerprint(model)}
    )


@torch.no_grad()
def base_fingerprint(model: "PreTrainedModel") -> str:
    """Hex digest of a model's own weights: names, shapes and FINGERPRINT_VALUES numbers of each, evenly spaced.

    Numbers are rounded to bf16, so that a model loaded in float32 and in bfloat16 has one fingerprint. Training
    changes it: of so many numbers some cross a rounding boundary even where each moves by a thousandth of its size.
    Weights in shards are gathered, one by one: every rank must ask. A frozen base's was kept when it was sharded.
    """
    kept = getattr(model, "_fingerprint", None)
    if kept is not None:
        return kept
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if ".lora_A." in name or ".lora_B." in name:
            continue
        flat = whole(weight.detach()).reshape(-1)
        some = flat[:: max(1, flat.numel() // FINGERPRINT_VALUES)].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(some.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def saved_fingerprint(directory: Path) -> str | None:
    """The fingerprint of the base an adapter on disk was trained on; None where whoever wrote it did not say."""
    try:
        with safe_open(str(directory / WEIGHTS), framework="pt") as file:
            return (file.metadata() or {}).get(FINGERPRINT)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{directory / WEIGHTS}: not a readable safetensors file ({error})") from error


def _shortest_names(model: "PreTrainedModel", paths: list[str]) -> list[str]:
    """Last components where they name exactly these modules anywhere in the model, else the whole paths."""
    names = {path.rpartition(".")[2] for path in paths}
    linears = {p for p, m in model.named_modules() if isinstance(m, torch.nn.Linear)} | set(decoder_linears(model))
    named = {p for p in linears if p.rpartition(".")[2] in names}
    return sorted(names) if named == set(paths) else sorted(paths)


def read_spec(directory: Path) -> LoraSpec:
    """The LoraSpec of an adapter on disk; ValueError for what LoRALinear does not do."""
    file = directory / CONFIG
    if not file.is_file():
        raise ValueError(f"{directory}: no {CONFIG}; it must hold an adapter in PEFT's layout")
    config = json.loads(file.read_text())
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {config.get('peft_type')!r}; only LORA is supported")
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(key):
            raise ValueError(f"{file}: {key} is set, which is not supported")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias is {config['bias']!r}; adapters with biases would change the bypassed rows")
    tensors = _read_tensors(directory)
    dtype = next((t.dtype for t in tensors.values()), torch.float32)
    suffixes = tuple({k.removeprefix(PREFIX).split(".lora_")[0]: None for k in tensors})
    return LoraSpec(r=config["r"], alpha=config["lora_alpha"], target_modules=suffixes, dtype=dtype)


def _read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{directory / WEIGHTS}: not a readable safetensors file ({error})") from error


@torch.no_grad()
def load_adapter(model: "PreTrainedModel", name: str, directory: Path) -> None:
    """Reads the tensors on disk into adapter `name`, which must have the same layers and shapes."""
    tensors = _read_tensors(directory)
    for path, layer in lora_layers(model).items():
        if name not in layer.lora_A:
            continue
        for kind, parameter in (("lora_A", layer.lora_A[name]), ("lora_B", layer.lora_B[name])):
            stored = tensors.pop(f"{PREFIX}{path}.{kind}.weight", None)
            if stored is None or stored.shape != parameter.shape:
                found = "nothing" if stored is None else list(stored.shape)
                raise ValueError(
                    f"{directory}: {path}.{kind} of adapter {name!r} is {found}; it must be {list(parameter.shape)}"
                )
            parameter.copy_(stored)
    if tensors:
        raise ValueError(f"{directory}: {next(iter(tensors))} fits no layer of adapter {name!r}")
