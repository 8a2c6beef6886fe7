"""``autoprune`` and ``python -m autoprune``."""

import sys

from autoprune.errors import MissingExtra
from autoprune.extras import needs


def main() -> None:
    """The command line; says what to install where it cannot start."""
    try:
        with needs("search", "the command line"):
            from autoprune.cli import main as run
    except MissingExtra as error:
        sys.exit(f"error: {error}")
    run()


if __name__ == "__main__":
    main()
