"""`train(config)`: what every algorithm shares. Build, resume, step, log, evaluate, save; the rows say the rest.

Order matters: everything that can be wrong with the input is found before the output directory is touched.
"""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rlhf_kernels.memory_scratch import PRODUCTS
from rlhf_kernels.nn.shards import fill, gathered
from rlhf_trainer import checkpoint
from rlhf_trainer.algorithms import Algorithm, find, with_defaults
from rlhf_trainer.budget import fitted
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.data import load_demonstrations, load_preferences, load_prompts
from rlhf_trainer.errors import UserError, one_line
from rlhf_trainer.identity import check_checkpoint
from rlhf_trainer.lock import DirectoryLock
from rlhf_trainer.metrics import MetricsLog
from rlhf_trainer.models import Policy, build, load_tokenizer
from rlhf_trainer.offline import Offline
from rlhf_trainer.online import Online
from rlhf_trainer.optim import Optimizer
from rlhf_trainer.processes import ALONE, Processes, join
from rlhf_trainer.rewards import RewardError, RewardSum, build_rewards
from rlhf_trainer.sampler import Sampler
from rlhf_trainer.signals import Interrupted, Stop, Terminated

# What may change between a run and its resumption; any other difference would make the loss curves differ (so does
# another total_steps under a schedule that ends with the run, but a run is lengthened on purpose).
FREE_ON_RESUME = {
    "device",
    "fsdp",
    "fsdp_rollouts",
    "eval_prompts",
    "eval_steps",
    "kv_memory",
    "logging_steps",
    "max_active",
    "memory_budget",
    "num_sample_completions",
    "output_dir",
    "report",
    "report_to",
    "resume",
    "save_steps",
    "save_total_limit",
    "slice_tokens",
    "total_steps",
}


@dataclass
class TrainResult:
    """Where the results are, how many steps were done, the metrics of the last one and of all this process did."""

    output_dir: Path
    step: int
    metrics: dict[str, float]
    history: list[dict[str, float]]


def train(config: TrainConfig) -> TrainResult:
    """Runs `config.algorithm` from start (or, with `resume`, from the newest checkpoint) to `total_steps`.

    With several processes (`rlhf_trainer.processes`) each runs this; all return the same, one of them writes.
    Raises UserError, before anything is written, for input that cannot work. After saving a checkpoint: RewardError,
    when a reward fails; Interrupted and Terminated (a KeyboardInterrupt, a SystemExit) on SIGINT and SIGTERM.
    """
    config = with_defaults(config.validate())
    _check_device(config.device)
    processes = join(config.device)
    with DirectoryLock(Path(config.output_dir), processes.main) as lock:
        return _train(config, processes, lock)


def _train(config: TrainConfig, processes: Processes, lock: DirectoryLock) -> TrainResult:
    output_dir, row, asked = Path(config.output_dir), find(config.algorithm), config.device
    with processes.together():
        lock.take(make=False)
    config = _as_before(config)
    _check_output(output_dir, config)
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(config)
    phase, policy = build_phase(replace(config, device=processes.device), row, tokenizer, processes)
    config = phase.config
    with _writing(output_dir, processes):
        if lock.take():  # what a run left that has come and gone meanwhile is looked at under the lock
            _check_output(output_dir, config)
        if processes.main:
            checkpoint.clear(output_dir)
    found = checkpoint.load(output_dir) if config.resume else None
    start = 0
    if found is not None:
        _restore(found, phase, policy)
        start = found.step
    processes.copy_from_main(policy.kept.values())
    with _writing(output_dir, processes):
        log = MetricsLog(output_dir, replace(config, device=asked), start or None, main_process=processes.main)
    history: list[dict[str, float]] = []
    try:
        with Stop() as stop:
            if phase.sampler is not None:
                phase.sampler.progress = stop.watching(log.completed)
            if start == 0:
                _evaluate_untrained(phase, policy, config, log)
            for step in range(start, config.total_steps):
                _leave_if_asked(stop, step, phase, policy)
                history.append(_step(phase, policy, step, config, log, stop))
            _leave_if_asked(stop, max(start, config.total_steps), phase, policy)
    finally:
        log.close()
    with _writing(output_dir, processes):
        policy.export(output_dir, tokenizer, processes.main)
        if config.report and processes.main:
            from rlhf_trainer.report import write_report

            write_report(output_dir)
    return TrainResult(output_dir, max(start, config.total_steps), history[-1] if history else {}, history)


def _evaluate_untrained(phase: Online | Offline, policy: Policy, config: TrainConfig, log: MetricsLog) -> None:
    """Held-out completions before the first update, as step 0: what the later ones are compared with."""
    output_dir = Path(config.output_dir)
    try:
        metrics = phase.evaluate()
    except RewardError:
        _save(output_dir, 0, phase, policy)
        raise
    if metrics:
        with _writing(output_dir, phase.processes):
            log.samples(0, phase.samples)
            log.log(0, metrics)


def _leave_if_asked(stop: Stop, step: int, phase: Online | Offline, policy: Policy) -> None:
    """Once a signal came, to any process: saves what `step` steps made of the run, and raises."""
    stop.agree(phase.processes)
    if stop.asked is not None:
        output_dir = Path(phase.config.output_dir)
        _save(output_dir, step, phase, policy)
        stop.leave_if_asked(f"checkpoint-{step} is saved in {str(output_dir)!r}; --resume goes on from it")


def _step(
    phase: Online | Offline, policy: Policy, step: int, config: TrainConfig, log: MetricsLog, stop: Stop
) -> dict[str, float]:
    """Step number `step` (from 0), with its evaluation, its line in the log and its checkpoint."""
    output_dir, done = Path(config.output_dir), step + 1
    last = done == config.total_steps
    try:
        with stop.rollout(phase.processes):
            metrics = phase.step(step)
    except (RewardError, Interrupted, Terminated):  # nothing was updated yet
        _leave_if_asked(stop, step, phase, policy)  # a terminal's Ctrl-C also makes a reward's own processes fail
        _save(output_dir, step, phase, policy)
        raise
    evaluating = last or (config.eval_steps > 0 and done % config.eval_steps == 0)
    metrics["memory/peak"] = float(max(phase.processes.each(_peak_bytes)))
    if evaluating:
        try:
            metrics |= phase.evaluate()  # its completions, of the same prompts each time, are then the samples
        except RewardError:
            with _writing(output_dir, phase.processes):
                log.log(done, metrics)  # the step itself is done: a resumed run does not repeat it
            _save(output_dir, done, phase, policy)
            raise
    with _writing(output_dir, phase.processes):
        if step == 0 or evaluating:
            log.samples(done, phase.samples)
        log.log(done, metrics)
    if last or (config.save_steps > 0 and done % config.save_steps == 0):
        _save(output_dir, done, phase, policy)
    return metrics


def build_phase(
    config: TrainConfig, row: Algorithm, tokenizer: Any, processes: Processes = ALONE
) -> tuple[Online | Offline, Policy]:
    """Data and rewards first (cheap, and where most mistakes are), then the models. The phase has the configuration
    that fits a memory budget.
    """
    # A row of packed tokens has another length each time, and oneDNN and PyTorch's binding of it would each keep the
    # compiled products of 1,024 shapes in bf16, half a gigabyte and more. Both read their limit at their first product.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, str(PRODUCTS))
    if row.data is not None:
        rows: list[Any] = (
            load_demonstrations(config, tokenizer)
            if row.data == "demonstrations"
            else load_preferences(config, tokenizer)
        )
        eval_prompts = load_prompts(config, tokenizer, "eval_prompts") if config.reward else []
        config = fitted(config, row, rows)
        rewards = build_rewards(config)
        policy = build(config, row, processes)
        sampler = build_sampler(config, policy, tokenizer, rewards, processes) if eval_prompts else None
        optimizer = Optimizer(policy.groups, config, config.total_steps, processes)
        return Offline(policy.model, row, config, optimizer, rows, sampler, eval_prompts, processes), policy
    prompts = load_prompts(config, tokenizer)
    eval_prompts = load_prompts(config, tokenizer, "eval_prompts")
    demonstrations = load_demonstrations(config, tokenizer, "demonstrations") if config.demonstrations else []
    config = fitted(config, row, [*prompts, *eval_prompts, *demonstrations])
    rewards = build_rewards(config)
    policy = build(config, row, processes)
    updates = config.total_steps * (config.num_ppo_epochs or 1) * config.num_mini_batches
    optimizer = Optimizer(policy.groups, config, updates, processes)
    sampler = build_sampler(config, policy, tokenizer, rewards, processes)
    phase = Online(policy.model, row, config, optimizer, sampler, prompts, eval_prompts, demonstrations, processes)
    return phase, policy


def build_sampler(
    config: TrainConfig, policy: Policy, tokenizer: Any, rewards: RewardSum | None, processes: Processes = ALONE
) -> Sampler:
    """What samples by the policy's actor; rewards None: the policy's reward head."""
    return Sampler(
        policy.model,
        config,
        rewards,
        lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
        () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,),
        processes=processes,
    )


def _check_device(device: str) -> None:
    if not device.startswith("cuda"):
        return
    index = int(device.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise UserError(f"device: {device!r} is not there; PyTorch sees {torch.cuda.device_count()} CUDA devices")


def _as_before(config: TrainConfig) -> TrainConfig:
    """A resumed run keeps the micro-batch and the arena that a memory budget gave it."""
    saved = checkpoint.newest_state(Path(config.output_dir)) if config.resume else None
    if saved is None or config.memory_budget is None:
        return config
    names = [] if config.kv_memory is not None else ["kv_memory"]
    if config.per_device_train_batch_size is None:
        names += ["per_device_train_batch_size", "gradient_accumulation_steps"]
    return replace(config, **{name: saved["config"][name] for name in names})


def _check_output(output_dir: Path, config: TrainConfig) -> None:
    """UserError when the directory cannot be made, holds another run, or the run to go on with was set up otherwise."""
    above = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"output_dir: {str(output_dir)!r} cannot be made: {str(above)!r} is no directory to write in")
    if config.resume:
        checkpoint.check(output_dir)
    saved = checkpoint.newest_state(output_dir) if config.resume else None
    before = {} if saved is None else saved["config"]
    for name, value in asdict(config).items():
        if name not in FREE_ON_RESUME and name in before and before[name] != value:
            was = before[name]
            raise UserError(f"resume: {name} was {was!r} in the checkpoint and is {value!r} now; they must agree")
    if not config.resume and checkpoint.steps(output_dir):
        raise UserError(
            f"output_dir: {str(output_dir)!r} already holds checkpoints; resume=True goes on from them, "
            "another output_dir starts anew"
        )


def _save(output_dir: Path, step: int, phase: Online | Offline, policy: Policy) -> None:
    state = {"updates": phase.optimizer.updates, "phase": phase.state(), "config": asdict(phase.config)}
    state["frozen"] = policy.frozen
    model: dict[str, torch.Tensor] = dict(policy.kept)
    optimizer = phase.optimizer.state_tensors()
    if policy.model.sharding is not None:
        model, optimizer = (gathered(part, phase.processes.main) for part in (model, optimizer))
    found = checkpoint.Checkpoint(step, model, optimizer, state)
    with _writing(output_dir, phase.processes):
        if phase.processes.main:
            checkpoint.save(output_dir, found, phase.config.save_total_limit)


@contextmanager
def _writing(output_dir: Path, processes: Processes) -> Iterator[None]:
    """A disk that is full or refuses is for the user to mend: one line. The checkpoints before stay whole.

    The other processes wait until the one that writes has written.
    """
    with processes.together():
        try:
            yield
        except (OSError, SafetensorError) as error:
            message = f"writing to {str(output_dir)!r} failed: {one_line(error)}; the checkpoints before are whole"
            raise UserError(f"output_dir: {message}") from error


def _restore(found: checkpoint.Checkpoint, phase: Online | Offline, policy: Policy) -> None:
    """Puts the checkpoint's state back; UserError, nothing changed, when it is another model's."""
    check_checkpoint(found, policy, phase.optimizer)
    with torch.no_grad():
        for name, parameter in policy.kept.items():
            fill(parameter, found.model[name])
    phase.optimizer.load_state_tensors(found.optimizer, found.state["updates"])
    phase.load_state(found.state["phase"])


def _peak_bytes() -> int:
    """The most bytes held so far: on CUDA by tensors, else the process's resident peak."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
