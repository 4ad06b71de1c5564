"""`python -m reference_train`: the command by its first word."""

from collections.abc import Sequence

from .errors import run


def main(argv: Sequence[str]) -> None:
    """`pretrain`, `evaluate`, `report`, or else the demonstration; imported only when asked for."""
    if argv[:1] == ["pretrain"]:
        from .pretrain.command import main as command

        command(argv[1:])
    elif argv[:1] == ["evaluate"]:
        from .evaluate.command import main as command

        command(argv[1:])
    elif argv[:1] == ["report"]:
        from .evaluate.report import main as command

        command(argv[1:])
    else:
        from .demo.command import main as command

        command(argv)


if __name__ == "__main__":
    run(main)
