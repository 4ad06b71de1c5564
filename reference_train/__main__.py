"""`python -m reference_train`: the command by its first word, and how it ends.

Exit codes: 0 done, 1 it went wrong, 2 it can't start, 130 interrupted.
"""

import sys
from collections.abc import Sequence

from .errors import Stopped


def main(argv: Sequence[str]) -> None:
    """`pretrain`, `evaluate`, or else the demonstration; each is imported only when asked for."""
    if argv[:1] == ["pretrain"]:
        from .pretrain.command import main as command

        command(argv[1:])
    elif argv[:1] == ["evaluate"]:
        from .evaluate.command import main as command

        command(argv[1:])
    else:
        from .demo.command import main as command

        command(argv)


def run() -> None:
    """The command line: an error is one line."""
    try:
        main(sys.argv[1:])
    except Stopped as error:
        print(f"reference_train: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("reference_train: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run()
