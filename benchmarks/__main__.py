"""Run benchmarks by name; without names, the quick ones.

python -m benchmarks [NAME ...]    with names: cache chain commands decode distributed export ladder neighbour
packed prediction quality serve simulator slots soak solve startup truth
"""

import importlib
import sys

QUICK = ("chain", "commands")


def main(names: list[str]) -> None:
    """Run each benchmark in turn; nothing else should be running on the machine."""
    for name in names or QUICK:
        importlib.import_module(f"benchmarks.bench_{name}").main()


if __name__ == "__main__":
    main(sys.argv[1:])
