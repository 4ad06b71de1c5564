"""What ends a command with one line and an exit code, which `__main__.py` sees to."""


class Stopped(Exception):
    """The command went wrong under way; the message is one line for the user."""

    exit_code = 1


class CannotStart(Stopped):
    """What the user asked for can't be done."""

    exit_code = 2


class Interrupted(Stopped):
    """Ctrl-C came, and what was done so far is saved."""

    exit_code = 130
