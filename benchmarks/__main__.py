"""``python -m benchmarks NAME [options]``; ``--list`` names the benchmarks, ``NAME --help`` the options of one."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from autoprune.errors import AutopruneError, did_you_mean
from benchmarks import BENCHMARKS

STOPPED = 130  # exit status of a command that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", usage="%(prog)s NAME [options] | --list")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("name", nargs="?", help="of a benchmark; NAME --help says its options")
    parser.add_argument("options", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.list or given.name is None:
        width = max(map(len, BENCHMARKS))
        print("\n".join(f"{name:{width}}  {what}" for name, what in BENCHMARKS.items()))
        return 0
    if given.name not in BENCHMARKS:
        parser.error(f"unknown benchmark: {given.name!r}. {did_you_mean(given.name, BENCHMARKS)}")
    try:
        return int(importlib.import_module(f"benchmarks.{given.name}").main(given.options))
    except KeyboardInterrupt:
        print("stopped; what was measured is kept, the same command goes on from here", file=sys.stderr)
        return STOPPED
    except AutopruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
