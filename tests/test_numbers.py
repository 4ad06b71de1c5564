"""The measured numbers on the pages are the recorded ones."""

import subprocess
import sys

from processes import ROOT


def test_the_tables_of_the_pages_are_made_of_the_records() -> None:
    command = [sys.executable, ROOT / ".mkdocs/tables.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr, result.returncode) == ("", "", 0)
