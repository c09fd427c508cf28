"""A HydraModel on disk: adapters in PEFT's layout, heads in one file, trained bases as transformers'."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_kernels.integrations import peft_layout  # it imports this package: its names are there only later
from rlhf_kernels.nn.shards import gathered

if TYPE_CHECKING:
    from rlhf_kernels.nn.hydra import HydraModel

HEADS_FILE = "heads.safetensors"
PEFT_DEFAULT = "default"  # PEFT's name for the adapter it saves in the directory itself


def save(model: "HydraModel", directory: Path) -> None:
    """HydraModel.save_pretrained. What lies in shards is gathered by all ranks and written by the first."""
    writes = model.sharding is None or model.sharding.leads
    prints = {where: peft_layout.base_fingerprint(model.decoder(where)) for where in sorted({*model.adapters.values()})}
    if writes:
        directory.mkdir(parents=True, exist_ok=True)
        for adapter, where in model.adapters.items():
            peft_layout.save_adapter(model.decoder(where), adapter, directory / adapter, prints[where])
        if model.heads:
            save_heads(model.linear_heads(), directory)
    for name in model.trainable_bases:
        weights = base_weights(model, name)
        if writes:
            model.decoder(name).save_pretrained(directory / name, state_dict=weights)


def base_weights(model: "HydraModel", name: str) -> dict[str, Tensor]:
    """A base's own tensors by name, without adapters; {} on the ranks that do not write, and must ask all the same."""
    own = {k: v for k, v in model.decoder(name).state_dict().items() if ".lora_A." not in k and ".lora_B." not in k}
    return own if model.sharding is None else gathered(own, model.sharding.leads)


def load_adapters(model: "HydraModel", directory: Path, names: Mapping[str, str] | None = None) -> list[str]:
    """HydraModel.load_adapters."""
    found = {path.parent.name: path.parent for path in sorted(directory.glob(f"*/{peft_layout.CONFIG}"))}
    if (directory / peft_layout.CONFIG).is_file():
        found = {PEFT_DEFAULT: directory} | found
    if not found and not (directory / HEADS_FILE).is_file():
        raise ValueError(f"{directory}: no adapter in this directory; it must hold <adapter>/{peft_layout.CONFIG}")
    names = dict(names or {})
    for name in names:
        if name not in found:
            raise ValueError(f"names: {name!r} is not in {directory}, which holds {', '.join(found) or 'no adapter'}")
    loaded = {names.get(name, name): path for name, path in found.items()}
    if len(loaded) < len(found):
        raise ValueError(f"names: {names} gives two adapters one name")
    specs = {name: peft_layout.read_spec(path) for name, path in loaded.items()}  # refused before anything is changed
    for name, path in loaded.items():
        if name not in model.adapters:
            model.add_adapter(name, specs[name])
        peft_layout.load_adapter(model.decoder(model.adapters[name]), name, path)
    if (directory / HEADS_FILE).is_file():
        load_heads(model.linear_heads(), directory / HEADS_FILE)
    return list(loaded)


def load_base_heads(model: "HydraModel", file: Path, base: str) -> None:
    """The heads of a checkpoint's own file belong to that base, whatever it is called here."""
    own = {role.head_key: role.head for role in model.roles.values() if role.base == base and role.head != "lm"}
    mine = {name: head for key, name in own.items() if (head := model.linear_heads().get(key)) is not None}
    load_heads(mine, file)


def save_heads(heads: Mapping[str, nn.Linear], directory: Path) -> None:
    tensors = {f"{key}.weight": head.weight.detach().cpu().contiguous() for key, head in heads.items()}
    save_file(tensors, directory / HEADS_FILE, metadata={"format": "pt"})


@torch.no_grad()
def load_heads(heads: Mapping[str, nn.Linear], file: Path) -> None:
    """Fills the heads that `file` has; the others stay. ValueError where a shape does not fit."""
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from error
    for key, head in heads.items():
        stored = tensors.get(f"{key}.weight")
        if stored is None:
            continue
        if stored.shape != head.weight.shape:
            raise ValueError(f"{file}: head {key!r} is {list(stored.shape)}; it must be {list(head.weight.shape)}")
        head.weight.copy_(stored)
