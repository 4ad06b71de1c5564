"""The measured numbers on the pages are the recorded ones."""

import json
import subprocess
import sys

from processes import ROOT

BENCHMARKS = (ROOT / "benchmarks/README.md").read_text()


def test_the_tables_of_the_pages_are_made_of_the_records() -> None:
    command = [sys.executable, ROOT / ".mkdocs/tables.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr, result.returncode) == ("", "", 0)


def test_each_record_is_listed_with_its_command_version_and_duration() -> None:
    records = [
        path
        for path in (ROOT / "benchmarks/results").glob("*.json")
        if path.with_suffix(".md").exists()
    ]
    assert records
    for path in records:
        record = json.loads(path.read_text())
        (line,) = [x for x in BENCHMARKS.splitlines() if f"(results/{path.stem}.md)" in x]
        _, command, version, duration, _ = (cell.strip() for cell in line.split(" |"))
        assert command == f"`{record['command']}`"
        versions = record["versions"]
        assert version.split(",")[0] == versions.get("commit", versions.get("cyclip_loss"))
        assert duration == f"{record['seconds'] / 60:.0f} minutes"
