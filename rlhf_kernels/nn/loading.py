"""From a path, a hub id or a module to a frozen decoder that runs on packed rows."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from rlhf_kernels.integrations.transformers import check_decoder, use_packed_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def local_directory(source: "str | os.PathLike[str]") -> Path | None:
    """The directory `source` names, or None where it can only be a hub id.

    Raises ValueError for what looks like a path (absolute, ./, ../, ~, more than one slash, a parent that is here) and
    is no directory: a typing error must not become a download.
    """
    text = os.fspath(source)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    looks_like_a_path = (
        not isinstance(source, str)
        or text.startswith((".", "~", os.sep))
        or text.endswith("/")
        or text.count("/") > 1
        or ("/" in text and path.parent.is_dir())
    )
    if looks_like_a_path or not text:
        raise ValueError(f"model: {text!r}: no such directory")
    return None


def load_decoder(
    source: "str | os.PathLike[str] | PreTrainedModel", dtype: torch.dtype | None, device: "torch.device | str | None"
) -> "PreTrainedModel":
    """A causal decoder in eval mode, packed attention on. A module is taken over as it is (its dtype too)."""
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

    if isinstance(source, PreTrainedModel):
        model = source
    else:
        directory = local_directory(source)
        if directory is not None and not (directory / "config.json").is_file():
            raise ValueError(
                f"model: {os.fspath(source)!r}: no config.json in this directory{_what_it_holds(directory)}"
            )
        place = os.fspath(source) if directory is None else str(directory)
        local = directory is not None
        config = AutoConfig.from_pretrained(place, local_files_only=local)
        if config.is_encoder_decoder:
            raise ValueError(f"model: {place!r} is an encoder-decoder model; only causal decoders are supported")
        model = AutoModelForCausalLM.from_pretrained(
            place, dtype="auto" if dtype is None else dtype, local_files_only=local
        )
    check_decoder(model)
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise ValueError(f"model: {type(model).__name__} has no linear output head")
    use_packed_attention(model)
    if device is not None:
        cast(nn.Module, model).to(device)
    return model.eval()


def _what_it_holds(directory: Path) -> str:
    """What to do with a directory of adapters, which is not a model."""
    found = [*directory.glob("adapter_config.json"), *directory.glob("*/adapter_config.json")]
    if not found:
        return ""
    base = json.loads(found[0].read_text()).get("base_model_name_or_path")
    return f"; it holds adapters: load their base{f' ({base})' if base else ''}, then call load_adapters with this path"


def saved_base(path: "str | os.PathLike[str]") -> "str | os.PathLike[str]":
    """`path` itself, or its subdirectory "base" where `path` is what HydraModel.save_pretrained wrote."""
    directory = local_directory(path)
    if directory is not None and not (directory / "config.json").is_file() and (directory / "base").is_dir():
        return directory / "base"
    return path
