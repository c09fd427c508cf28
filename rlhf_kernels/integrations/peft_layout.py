"""Adapters in PEFT's layout on disk: adapter_config.json beside adapter_model.safetensors. PEFT is not needed.

The tensors' file says in its metadata which base they were trained on (`base_fingerprint`); PEFT passes over it.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_kernels.nn.lora import LoraSpec, adapter_routes, decoder_linears, lora_layers
from rlhf_kernels.nn.shards import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT wraps a model twice before it names its modules
MATRIX = re.compile(re.escape(PREFIX) + r"(.+)\.lora_[AB]\.weight")
ADDS_OR_NOTHING = (True, False, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave the base as it was
REFUSED = {  # keys of a LoraConfig -> why a LoRALinear cannot do what they say
    "use_dora": "it rescales whole weights, which rows without the adapter share",
    "lora_bias": "it adds a bias beside the two matrices",
    "modules_to_save": "they replace modules of the base, which other adapters and the bypass share",
    "trainable_token_indices": "they replace rows of the base's embedding, which other adapters and the bypass share",
    "target_parameters": "they adapt parameters that are no Linear's weight",
    "layer_replication": "it makes another model of the base",
    "alora_invocation_tokens": "the adapter starts in the middle of a sequence",
    "use_qalora": "its matrix A reads groups of inputs",
    "use_bdlora": "its matrices are block diagonal",
    "arrow_config": "it chooses between adapters for each token",
    "kasa_config": "it changes the base's weights",
    "monteclora_config": "its matrices are random",
}
REMEDY = "merge it into the base with PEFT's merge_and_unload and load the merged model, or train without it"
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
    ranks = {path: layer.lora_A[name].shape[0] for path, layer in layers.items()}
    other = {path: r for path, r in ranks.items() if r != spec.r}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.config._name_or_path or None,
        "r": spec.r,
        "lora_alpha": spec.alpha,
        "use_rslora": spec.use_rslora,
        "rank_pattern": other,
        "alpha_pattern": {path: spec.scaling * _divisor(r, spec.use_rslora) for path, r in other.items()},
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


def base_fingerprint(model: "PreTrainedModel") -> str:
    """`weights_fingerprint` of a model's own weights, without adapters; a frozen base's is kept when it is sharded."""
    kept = getattr(model, "_fingerprint", None)
    if kept is not None:
        return kept
    own = ((n, w) for n, w in model.named_parameters() if ".lora_A." not in n and ".lora_B." not in n)
    return weights_fingerprint(own)


@torch.no_grad()
def weights_fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Hex digest of named weights: names, shapes and FINGERPRINT_VALUES numbers of each, evenly spaced.

    Numbers are rounded to bf16, so that a model loaded in float32 and in bfloat16 has one fingerprint. Training
    changes it: of so many numbers some cross a rounding boundary even where each moves by a thousandth of its size.
    Weights in shards are gathered, one by one: every rank must ask.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(weights, key=lambda named: named[0]):
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
    config, tensors = _read_config(directory), _read_tensors(directory)
    dtype = next((t.dtype for t in tensors.values()), torch.float32)
    ranks: dict[str, int] = {}
    for key, tensor in tensors.items():
        named = MATRIX.fullmatch(key)
        if named is None:
            raise ValueError(f"{directory}: {key} is no LoRA matrix of a Linear; nothing else is supported; {REMEDY}")
        if ".lora_A." in key:
            ranks[named[1]] = tensor.shape[0]
    other = {path: r for path, r in ranks.items() if r != config["r"]}
    return LoraSpec(
        r=config["r"],
        alpha=config["lora_alpha"],
        target_modules=tuple(ranks),
        dtype=dtype,
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern=other or None,
    )


def _read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json; ValueError, naming the key and what to do, for what LoRALinear does not do."""
    file = directory / CONFIG
    if not file.is_file():
        raise ValueError(f"{directory}: no {CONFIG}; it must hold an adapter in PEFT's layout")
    config = json.loads(file.read_text())
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {config.get('peft_type')!r}; only LORA is supported")
    for key, why in REFUSED.items():
        if config.get(key):
            raise ValueError(f"{file}: {key} is {config[key]!r}, which is not supported: {why}; {REMEDY}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias is {config['bias']!r}; biases would change the bypassed rows; {REMEDY}")
    start = config.get("init_lora_weights", True)
    if start not in ADDS_OR_NOTHING:
        raise ValueError(
            f"{file}: init_lora_weights is {start!r}, which changed the base the adapter is for; save it with PEFT's "
            "path_initial_model_for_weight_conversion, or merge it with merge_and_unload"
        )
    return config


def _scaling(config: Mapping[str, Any], path: str, r: int) -> float:
    """What PEFT multiplies B A by on the layer at a path."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), config["lora_alpha"])
    return alpha / _divisor(r, bool(config.get("use_rslora")))


def _divisor(r: int, use_rslora: bool) -> float:
    return math.sqrt(r) if use_rslora else r


def _read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{directory / WEIGHTS}: not a readable safetensors file ({error})") from error


@torch.no_grad()
def load_adapter(model: "PreTrainedModel", name: str, directory: Path) -> None:
    """Reads the tensors on disk into adapter `name`, which must have the same layers and shapes.

    An adapter has one scaling here. Where PEFT's is another on a layer, B takes up the ratio: the product is the same.
    """
    config, tensors = _read_config(directory), _read_tensors(directory)
    spec = adapter_routes(model).specs[name]
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
        ratio = _scaling(config, path, layer.lora_A[name].shape[0]) / spec.scaling
        if ratio != 1.0:
            layer.lora_B[name].mul_(ratio)
    if tensors:
        raise ValueError(f"{directory}: {next(iter(tensors))} fits no layer of adapter {name!r}")
