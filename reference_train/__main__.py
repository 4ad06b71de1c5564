"""`python -m reference_train`: the command by its first word."""

from collections.abc import Sequence

from .errors import run


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


if __name__ == "__main__":
    run(main)
