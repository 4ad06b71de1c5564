"""`python -m reference_train [COMMAND]`: runs a command or, without one, the demonstration."""

from collections.abc import Sequence
from importlib import import_module

from .command_line import UsageError, run

COMMANDS = {
    "pretrain": ".pretrain.pretrain",
    "evaluate": ".evaluate.evaluate",
    "compare": ".compare.compare",
    "report": ".evaluate.report",
}


def main(argv: Sequence[str]) -> None:
    """Runs the command `argv[0]`, or the demonstration if that is no command.

    Only the module of this command is imported.
    """
    is_command = bool(argv) and argv[0] in COMMANDS
    try:
        module = import_module(COMMANDS[argv[0]] if is_command else ".demo.demo", __package__)
    except ImportError as error:
        folder = "reference_train/pretrain" if argv[:1] == ["pretrain"] else "reference_train"
        raise UsageError(f"{error}: pip install -r {folder}/requirements.txt") from error
    module.main(argv[1:] if is_command else argv)


if __name__ == "__main__":
    run(main)
