"""From a configuration and a layout to a HydraModel with its trained parameters by group, and back to files."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from rlhf_kernels.integrations.peft_layout import CONFIG as ADAPTER_CONFIG
from rlhf_kernels.integrations.peft_layout import (
    base_fingerprint,
    load_adapter,
    read_spec,
    saved_fingerprint,
    weights_fingerprint,
)
from rlhf_kernels.nn import HydraModel, LoraSpec, shard
from rlhf_kernels.nn.disk import base_weights, load_heads
from rlhf_trainer import checkpoint
from rlhf_trainer.algorithms import Algorithm, Layout
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.errors import UserError, one_line
from rlhf_trainer.hub import unreachable
from rlhf_trainer.processes import ALONE, Processes

HEADS_FILE = "heads.safetensors"


@dataclass
class Policy:
    """The models of a run; `trained`: the trained parameters by their names; `groups`: with learning rates.

    kept: what a checkpoint holds: `trained`, and the snapshots. frozen: the fingerprint of all the rest.
    """

    model: HydraModel
    layout: Layout
    trained: dict[str, nn.Parameter]
    groups: dict[str, tuple[float, dict[str, nn.Parameter]]]
    kept: dict[str, nn.Parameter]
    frozen: str

    def export(self, output_dir: Path, tokenizer: Any, writes: bool = True) -> None:
        """The result for other programs: PEFT adapters or checkpoints (the policy's at the top), heads, tokenizer.

        Of several processes one `writes`; all must call, to gather what lies in shards.
        """
        sharded = self.model.sharding is not None
        bases = {spec.base for spec in self.layout.roles.values() if spec.base in self.layout.trained_bases}
        weights = {base: base_weights(self.model, base) for base in sorted(bases) if sharded}
        if not writes:
            if sharded and self.layout.adapters:
                self.model.save_pretrained(output_dir)  # it writes nothing here
            return

        def write(directory: Path) -> None:
            if self.layout.adapters:
                self.model.save_pretrained(str(directory))
            for name in (*self.layout.loaded, *self.layout.snapshots):  # not results of this run
                shutil.rmtree(directory / name, ignore_errors=True)
            for role, spec in self.layout.roles.items():
                if spec.base not in self.layout.trained_bases:
                    continue
                place = directory if spec.base == "base" else directory / spec.base
                if not (place / "config.json").exists():
                    self.model.base_model(role).save_pretrained(str(place), state_dict=weights.get(spec.base))
                if spec.head != "lm" and f"heads.{spec.head_key}.weight" in self.trained:
                    head = self.trained[f"heads.{spec.head_key}.weight"].detach().cpu()
                    save_file({f"{spec.head}.weight": head}, place / HEADS_FILE, metadata={"format": "pt"})
            _save_tokenizer(tokenizer, directory)

        staging = output_dir / ".result"
        shutil.rmtree(staging, ignore_errors=True)
        checkpoint.atomic_directory(staging, write)
        for entry in staging.iterdir():
            target = output_dir / entry.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(entry, target)
        staging.rmdir()


def _save_tokenizer(tokenizer: Any, directory: Path) -> None:
    try:
        tokenizer.save_pretrained(str(directory))
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error  # what the tokenizers library makes of a full disk


def resolve(path: str) -> str:
    """ "demo" is the embedded checkpoint's directory; anything else is what it says."""
    if path == "demo":
        from rlhf_trainer.demo import checkpoint_path

        return str(checkpoint_path())
    return path


def load_tokenizer(config: TrainConfig) -> Any:
    """The model's tokenizer; UserError when there is none."""
    from transformers import AutoTokenizer

    _check_source("model", config.model)
    return _loading("model", config.model, lambda: AutoTokenizer.from_pretrained(resolve(config.model)))


def build(config: TrainConfig, row: Algorithm, processes: Processes = ALONE) -> Policy:
    """Loads the bases, attaches adapters, starts the critic's head from the reward head, shards the bases where that is
    asked for, and groups what is trained.
    """
    layout, sharded = row.layout(config), _sharding(config, processes)
    sources = {"model": config.model, "reward_model": config.reward_model or config.model}
    _check_reward_model(config, layout)
    _check_reward_head(config, layout, sources)
    _check_rank(config, layout)
    targets: Any = config.lora_target_modules
    if targets != "all-linear":
        targets = [name.strip() for name in targets.split(",")]
    saved = {name: Path(resolve(sources[source])) for name, source in layout.loaded.items()}
    adapters = {name: _spec(name, config, layout, saved) for name in layout.adapters}
    model = _loading(
        "model",
        config.model,
        lambda: HydraModel.from_pretrained(
            resolve(config.model),
            adapters=adapters,
            roles=dict(layout.roles),
            bases={name: resolve(sources[source]) for name, source in layout.bases.items()} or None,
            train_base=list(layout.trained_bases),
            target_modules=targets,
            dtype=getattr(torch, config.dtype),
            device="cpu" if sharded else config.device,  # a base that does not fit goes to the device in shards
        ),
    )
    for name, directory in saved.items():
        _load_adapter(model, name, directory, layout.loaded[name], config)
    if "critic" in layout.roles:
        _start_critic(model, layout.head_start, _has_reward_head(resolve(sources[layout.head_source])))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if sharded:
        shard(model, rollouts=config.fsdp_rollouts, **sharded)  # type: ignore[arg-type]
    groups = _groups(model, row, config)
    trained = {name: parameter for _, members in groups.values() for name, parameter in members.items()}
    learning = {id(parameter) for parameter in trained.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in learning)
    kept = trained | _snapshots(model, layout)
    frozen = weights_fingerprint((name, weight) for name, weight in model.named_parameters() if name not in kept)
    return Policy(model, layout, trained, groups, kept, frozen)


def _sharding(config: TrainConfig, processes: Processes) -> dict[str, Any]:
    """How the bases are to be sharded: what `shard` takes, from accelerate's FSDP plugin where its launcher set one up;
    {}: not at all.
    """
    launched = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")
    if not (config.fsdp or launched):
        return {}
    if processes.count == 1:
        raise UserError("fsdp: shards lie over several processes; start them by torchrun or accelerate launch")
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(processes.device.partition(":")[0], (processes.count,))
    if not launched:
        return {"mesh": mesh}
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UserError(f"fsdp: accelerate's fsdp_version is {plugin.fsdp_version}; it must be 2")
    if plugin.cpu_offload:
        raise UserError("fsdp: accelerate's fsdp_offload_params is true; weights stay on the devices here")
    return {"mesh": mesh, "reshard_after_forward": bool(plugin.reshard_after_forward)}


def _spec(name: str, config: TrainConfig, layout: Layout, saved: dict[str, Path]) -> LoraSpec:
    """An adapter's rank, scaling and layers: the configuration's, or those it has in the run that left it."""
    if name not in saved:
        return LoraSpec(r=config.lora_r or 0, alpha=config.lora_alpha or 0.0)
    if not (saved[name] / name / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{layout.loaded[name]}: {str(saved[name])!r} holds no adapter {name!r}; "
            "it must be the output_dir of a run with lora_r > 0 that trained one"
        )
    return read_spec(saved[name] / name)


def _load_adapter(model: HydraModel, name: str, directory: Path, argument: str, config: TrainConfig) -> None:
    """Adapter `name` of a finished run, and the heads of the roles that use it; its base must be the one here."""
    base, place = model.decoder(model.base_of(name)), directory / name
    trained_on = saved_fingerprint(place)
    if trained_on not in (None, base_fingerprint(base)):
        raise UserError(
            f"{argument}: {str(directory)!r} was trained on another base than {config.model!r}; "
            "an adapter means nothing on weights it has not seen: train it on this model"
        )
    _loading(argument, str(directory), lambda: load_adapter(base, name, place))
    if (directory / HEADS_FILE).is_file():
        mine = {role.head_key for role in model.roles.values() if role.adapter == name}
        heads = {role_head: head for role_head, head in model.linear_heads().items() if role_head in mine}
        load_heads(heads, directory / HEADS_FILE)


def _snapshots(model: HydraModel, layout: Layout) -> dict[str, nn.Parameter]:
    """The parameters of the layout's snapshots by their names: those of an adapter, or a base's own."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, nn.Parameter] = {}
    for name, role in layout.roles.items():
        if role.adapter in layout.snapshots:
            found |= {names[id(p)]: p for p in model.trainable_parameters(name)}
        elif role.adapter is None and role.base in layout.snapshots:
            found |= {names[id(p)]: p for p in model.base_model(name).parameters()}
    return found


def _groups(model: HydraModel, row: Algorithm, config: TrainConfig) -> dict[str, tuple[float, dict[str, nn.Parameter]]]:
    """One group a trained role; what two roles share belongs to the first."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: dict[str, tuple[float, dict[str, nn.Parameter]]] = {}
    seen: set[int] = set()
    for role in row.trained:
        rate = config.critic_learning_rate if role == "critic" else config.learning_rate
        members = {names[id(p)]: p for p in model.trainable_parameters(role) if id(p) not in seen}
        seen.update(id(p) for p in members.values())
        if members:
            groups[role] = (float(rate or 0.0), members)
    return groups


def _start_critic(model: HydraModel, source: str | None, trained_head: bool) -> None:
    """The critic's head is a trainable copy of role `source`'s; without one that was trained values start at zero."""
    if source is not None and trained_head:
        model.copy_head(source, "critic")
    else:
        nn.init.zeros_(model.trainable_parameters("critic")[-1])


def _check_reward_model(config: TrainConfig, layout: Layout) -> None:
    """A checkpoint of its own for the reward must be there where it is needed, and be of use."""
    if not config.reward_model:
        if "reward_model" in layout.loaded.values():
            raise UserError(
                f"reward_model: {config.algorithm} needs the output_dir of a `reward` run with lora_r > 0 on this "
                "model, or --reward pkg.mod:function"
            )
        return
    if "reward_model" in layout.bases.values():
        _check_source("reward_model", config.reward_model)
    elif "reward_model" not in layout.loaded.values():
        raise UserError(
            f"reward_model: {config.algorithm} with lora_r > 0 has one base, which is its reward model too; "
            "leave it out, or give lora_r 0"
        )


def _check_reward_head(config: TrainConfig, layout: Layout, sources: dict[str, str]) -> None:
    """Rewards that nobody trained are an error, not noise."""
    if config.reward or "reward" not in layout.roles or config.algorithm in ("reward", "hydra-sft"):
        return
    role = layout.roles["reward"]
    source = layout.loaded.get(role.adapter or "") or layout.bases.get(role.base, "model")
    path = resolve(sources[source])
    if not _has_reward_head(path):
        raise UserError(
            f"reward: {path!r} has no reward head ({HEADS_FILE}); give --reward pkg.mod:function, "
            "or a model trained by `reward` or `hydra-sft`"
        )


def _check_rank(config: TrainConfig, layout: Layout) -> None:
    if bool(config.lora_r) != bool(layout.adapters):
        right = "at least 1: it trains adapters" if layout.adapters else "0: it trains whole models"
        raise UserError(f"lora_r: is {config.lora_r}; {config.algorithm} needs {right}")


def _has_reward_head(path: str) -> bool:
    file = Path(path) / HEADS_FILE
    if not file.is_file():
        return False
    with safe_open(str(file), framework="pt") as heads:
        return "reward.weight" in heads.keys()  # noqa: SIM118


def _check_source(name: str, value: str) -> None:
    """What transformers would say at length, or only after a minute of asking an unreachable hub."""
    folder = Path(resolve(value))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            adapter = (folder / "adapter_config.json").is_file()
            what = "a PEFT adapter, not a whole model" if adapter else "no config.json, so no model"
            raise UserError(f"{name}: {value!r} holds {what} in transformers' format")
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(value, "config.json")
    except HFValidationError as error:
        raise UserError(f"{name}: {value!r} is neither a directory nor a hub id") from error
    if not isinstance(cached, str) and (host := unreachable()):
        raise UserError(f"{name}: {value!r} does not exist here, and {host} cannot be reached to ask for it")


def _loading(name: str, value: str, load: Callable[[], Any]) -> Any:
    """Runs a loader; its errors about missing or unreadable files become one line that names the argument."""
    try:
        return load()
    except UserError:
        raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"{name}: {value!r} cannot be loaded: {one_line(error)[:200]}") from error
    except ValueError as error:
        raise UserError(f"{name}: {value!r}: {one_line(error)[:300]}") from error
