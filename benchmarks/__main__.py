"""Times the ops beside their peers, reports their errors, and renders the results.

python -m benchmarks lora --memory --json FILE     times, peak memory and targets (also: attention, gae, generation,
                                                   head, loops, rl, sampling, trl)
python -m benchmarks memory --write                the memory plan beside what the trainer takes
python -m benchmarks numerics --write              errors against float64, into docs/kernels.md
python -m benchmarks claims --write                the papers' claims, measured, into docs/reproduction.md
python -m benchmarks kills --write                 twenty kills, twenty resumed runs, into docs/checkpoints.md
python -m benchmarks processes --write             1, 2 and 4 processes beside each other, into docs/distributed.md
python -m benchmarks table FILES --write           tables of result files, into benchmarks/README.md
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# what the library's GEMMs may use, so that one machine shows what another would
LIBRARY_ISA = {"amx": "AVX512_CORE_AMX", "avx512_bf16": "AVX512_CORE_BF16"}


def main() -> None:
    args = parser().parse_args()
    if getattr(args, "isa", None):
        os.environ["RLHF_KERNELS_CPU_ISA"] = args.isa  # before torch and its libraries look
        if args.isa in LIBRARY_ISA:
            os.environ["ONEDNN_MAX_CPU_ISA"] = LIBRARY_ISA[args.isa]
    parts = {
        "claims": _claims,
        "kills": _kills,
        "memory": _memory,
        "numerics": _numerics,
        "processes": _processes,
        "table": _table,
    }
    parts.get(args.name, _benchmark)(args)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="name", required=True)
    for name in ("attention", "gae", "generation", "head", "loops", "lora", "rl", "sampling", "trl"):
        command = commands.add_parser(name)
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument("--rounds", type=int, help="timed runs of each contestant (5; on a GPU 20)")
        command.add_argument("--only", metavar="TEXT", help="only cases whose name holds TEXT (lora: also sweep)")
        command.add_argument(
            "--who", metavar="TEXT", nargs="+", default=(), help="only contestants whose name holds one"
        )
        command.add_argument("--memory", action="store_true", help="also peak memory, each in a fresh process")
        command.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
        command.add_argument(
            "--isa",
            choices=("amx", "avx512_bf16", "portable"),
            help="cap the CPU instructions of the library's GEMMs and of rlhf_kernels alike (portable: of ours alone)",
        )
        command.add_argument("--peak-of", nargs=2, metavar=("CASE", "CONTESTANT"), help=argparse.SUPPRESS)
    memory = commands.add_parser("memory", help="planned beside measured bytes of every algorithm")
    memory.add_argument("--only", metavar="TEXT", help="only runs whose 'algorithm size dtype' holds TEXT")
    memory.add_argument("--json", type=Path, metavar="FILE", default=ROOT / "benchmarks/results/cpu/memory.json")
    memory.add_argument("--again", action="store_true", help="measure anew what FILE holds already")
    memory.add_argument("--write", action="store_true", help="write the tables into benchmarks/README.md")
    numerics = commands.add_parser("numerics", help="errors against float64, ours beside each peer's")
    numerics.add_argument("--write", action="store_true", help="write the tables into docs/kernels.md")
    claims = commands.add_parser("claims", help="the papers' claims, each measured with the trainer itself")
    claims.add_argument("--scale", choices=("cpu", "h200", "tiny"), default="cpu", help="which models, on which device")
    claims.add_argument("--only", metavar="PART", nargs="+", default=(), help="memory, exact, latency, remax, ...")
    claims.add_argument("--write", action="store_true", help="keep the records and write docs/reproduction.md")
    claims.add_argument("--again", action="store_true", help="measure nothing: tables of the records that are there")
    kills = commands.add_parser("kills", help="runs killed at random moments and resumed, beside undisturbed ones")
    kills.add_argument("--kills", type=int, default=20, metavar="N", help="with signal 9; four other signals follow")
    kills.add_argument("--seed", type=int, default=0, help="of the moments")
    kills.add_argument("--write", action="store_true", help="write the table into docs/checkpoints.md")
    processes = commands.add_parser("processes", help="the same training on 1, 2 and 4 processes")
    processes.add_argument("--write", action="store_true", help="write the tables into docs/distributed.md")
    table = commands.add_parser("table", help="tables of result files")
    table.add_argument("files", nargs="*", type=Path)
    table.add_argument("--write", action="store_true", help="write the tables into benchmarks/README.md")
    return top


def _benchmark(args: argparse.Namespace) -> None:
    import torch

    from benchmarks import memory, runner, tables
    from benchmarks.registry import BENCHMARKS

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: this machine has no CUDA device that torch can use")
    cases = list(BENCHMARKS[args.name](args.device))
    if args.peak_of:
        case, contestant = args.peak_of
        chosen = next(c for c in cases if c.name == case)
        print(f'{{"peak_bytes": {memory.peak_of(chosen, contestant, args.device)}}}')
        return
    asked = runner.asked_for(cases, args.only)
    if not asked:
        sys.exit(f"--only {args.only!r}: no such case; there are:\n" + "\n".join(c.name for c in cases))
    result = runner.run_benchmark(args.name, asked, args.device, args.rounds, args.memory, args.who, _progress)
    print(f"\n{tables.heading(result)}. {tables.provenance(result)}\n")
    for case in tables.by_case(result):
        tables.print_case(result, case)
    if args.json:
        result.write(args.json)


def _progress(result: object, case: str) -> None:
    print(f"timed: {case}", file=sys.stderr, flush=True)


def _claims(args: argparse.Namespace) -> None:
    from benchmarks import claims

    claims.run(args.scale, args.only, args.write, args.again)


def _kills(args: argparse.Namespace) -> None:
    from benchmarks import kills

    if not kills.run(args.kills, args.seed, args.write):
        sys.exit("a resumed run is not the undisturbed one")


def _memory(args: argparse.Namespace) -> None:
    from benchmarks import memory_plan, tables

    result = memory_plan.run(args.only, args.json, args.again)
    text = memory_plan.markdown(result)
    print(text)
    if args.write:
        tables.write_between(ROOT / "benchmarks/README.md", "memory", text)


def _numerics(args: argparse.Namespace) -> None:
    from benchmarks import numerics, numerics_tables, tables

    report = numerics.report()
    numerics_tables.print_report(report)
    if args.write:
        tables.write_between(ROOT / "docs/kernels.md", "numerics", numerics_tables.markdown(report))


def _processes(args: argparse.Namespace) -> None:
    from benchmarks import processes, tables

    text = processes.markdown(processes.measure())
    print(text)
    if args.write:
        tables.write_between(ROOT / "docs/distributed.md", "processes", text)


def _table(args: argparse.Namespace) -> None:
    from benchmarks import tables
    from benchmarks.result import Result

    text = tables.markdown(Result.read(path) for path in sorted(args.files) if path.name != "memory.json")
    print(text)
    if args.write:
        tables.write_between(ROOT / "benchmarks/README.md", "tables", text)


if __name__ == "__main__":
    main()
