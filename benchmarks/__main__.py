"""Runs one benchmark: prints its table and, if asked, writes it as JSON."""

import argparse
from pathlib import Path

from benchmarks import runner
from benchmarks.registry import BENCHMARKS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=sorted(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="also measure peak memory, each in a fresh process")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--peak-of", nargs=2, metavar=("CASE", "CONTESTANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    cases = {case.name: case for case in BENCHMARKS[args.name]()}
    if args.peak_of:
        case, contestant = args.peak_of
        print(runner.peak_growth(cases[case].contestants[contestant]))
        return
    result = runner.new_result(args.name)
    for case in cases.values():
        for timing in runner.time_case(case, args.rounds):
            if args.memory:
                timing.peak_bytes = runner.peak_in_fresh_process(args.name, case.name, timing.contestant)
            result.timings.append(timing)
    runner.print_table(result)
    if args.json:
        result.write(args.json)


main()
