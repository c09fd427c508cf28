"""Prints the table of GPU kernels: registers, shared memory, spills and matrix instructions, no GPU needed."""

import argparse

from benchmarks.kernels import table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"also put it into {table.DOCUMENT.name}")
    write = parser.parse_args().write
    rows = table.everything()
    print(table.markdown(rows))
    if write:
        table.write(rows)


if __name__ == "__main__":
    main()
