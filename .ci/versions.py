"""Test with chosen versions of the dependencies, each set in a virtual environment of its own.

    python .ci/versions.py            `oldest`, `lowest`, the oldest OpenCLIP, and each minor
                                      version of PyTorch, from pyproject.toml's lower bound to the
                                      newest on the index
    python .ci/versions.py 2.11 2.14  these minor versions of PyTorch: loss, kernels, ranks
    python .ci/versions.py oldest     the lower bound: loss, kernels, compiled across ranks
    python .ci/versions.py lowest     the lowest version of every dependency: all tests
    python .ci/versions.py open_clip-2.32
                                      this minor version of OpenCLIP: its trainer and its flags

`pip install uv` first. uv resolves and installs; every PyTorch gets the Triton that it requires.
Prints a table; `--output FILE` also writes its rows into the table of a Markdown page, in the place
of older rows of these environments. The exit status is 1 if anything failed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
UV = (sys.executable, "-m", "uv")
LOSS = ("tests/loss", "tests/kernels")
TESTS = {
    # By its name, so that pytest fails if nothing has this name.
    "oldest": (*LOSS, "tests/ranks/test_ranks_training.py::test_compiled_and_eager_loss_are_equal"),
    "lowest": ("tests",),
}
OPEN_CLIP_TESTS = (
    "tests/trainers/test_open_clip_train.py",
    "tests/trainers/test_with_penalty.py",
)
HEAD = (
    "environment",
    "date",
    "commit",
    "PyTorch",
    "Triton",
    "Python",
    "NumPy",
    "OpenCLIP",
    "passed",
    "failed",
    "skipped",
    "seconds",
)
INSTALLED = """
import importlib.metadata, json, platform
versions = {"python": platform.python_version()}
for package in importlib.metadata.distributions():
    versions[package.metadata["Name"]] = package.version
print(json.dumps(versions))
"""


def lower_bound(name: str) -> str:
    """The minor version in `name>=2.8` of what the package or its tests require."""
    files = ("pyproject.toml", "tests/requirements.txt")
    text = "\n".join((ROOT / file).read_text() for file in files)
    return minor_version(rf'\b{name}(\[\w+\])?( = ")?>=', text)


def minor_version(before: str, text: str) -> str:
    """The first two numbers of the version that follows the pattern `before` in the text."""
    found = re.search(rf"{before}(?P<minor>\d+\.\d+)", text)
    if found is None:
        raise SystemExit(f"no version after {before!r} in: {text}")
    return found["minor"]


def minor_versions() -> list[str]:
    """PyTorch's minor versions on the index that run on this Python, oldest first."""
    oldest = lower_bound("torch")
    found: list[str] = []
    while oldest not in found:  # ask for the newest, then for the newest before it
        requirement = f"torch>={oldest}" + (f",<{found[0]}" if found else "")
        command = (*UV, "pip", "compile", "--quiet", "--no-deps", "--no-header", "--no-annotate")
        answer = subprocess.run(
            (*command, "--python", sys.executable, "-"),
            input=requirement,
            stdout=subprocess.PIPE,
            text=True,
            check=not found,
        )
        if answer.returncode:
            break  # older versions do not run on this Python
        found.insert(0, minor_version("torch==", answer.stdout))
    return found


def make_environment(name: str, folder: Path) -> Path:
    """Make the virtual environment and return its Python."""
    python = folder / "bin" / "python"
    venv = (*UV, "venv", "--quiet", folder, "--python")
    made = False
    if name in TESTS:
        oldest = lower_bound("requires-python")
        # pyenv runs `python3.10` only where version 3.10 is asked for.
        environment = os.environ | {"PYENV_VERSION": oldest}
        made = subprocess.run((*venv, oldest), env=environment).returncode == 0
        if not made:
            print(f"No Python {oldest} here: {sys.executable} instead.", flush=True)
    if not made:
        subprocess.run((*venv, sys.executable), check=True)

    install = (*UV, "pip", "install", "--quiet", "--python", python)
    chosen: tuple[str, ...]
    if name == "lowest":
        chosen = ("--resolution", "lowest-direct", "-r", "tests/requirements.txt")
    elif name.startswith("open_clip-"):
        # The requirements ask for a newer version.
        override = folder / "override.txt"
        override.write_text(f"open_clip_torch[training]=={name.removeprefix('open_clip-')}.*")
        chosen = ("--override", str(override), "-r", "tests/requirements.txt")
    else:
        torch = lower_bound("torch") if name == "oldest" else name
        # The benchmarks require what these tests import. PyTorch for CPU brings no Triton.
        triton = f"triton>={lower_bound('triton')}; platform_system == 'Linux'"
        chosen = ("-r", "benchmarks/requirements.txt", f"torch=={torch}.*", triton)
    subprocess.run((*install, "--editable", ".", *chosen), cwd=ROOT, check=True)
    triton = installed(python).get("triton", "4.0")
    if tuple(map(int, triton.split(".")[:2])) < (3, 7):
        # The interpreter before Triton 3.7 does not work with a newer NumPy.
        subprocess.run((*install, "numpy<2.4"), check=True)
    return python


def installed(python: Path) -> dict[str, str]:
    """The version of each package, and of Python."""
    answer = subprocess.run((python, "-c", INSTALLED), stdout=subprocess.PIPE, check=True)
    versions: dict[str, str] = json.loads(answer.stdout)
    return versions


def test(name: str) -> tuple[tuple[str, ...], bool]:
    """Install one environment and test in it. Returns a row of the table and whether all passed."""
    git = ("git", "describe", "--always", "--dirty")
    commit = subprocess.run(git, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.strip()
    first = (name, str(date.today()), commit or "unknown")
    with tempfile.TemporaryDirectory(prefix="cyclip-loss-") as temporary:
        folder = Path(temporary)
        try:
            python = make_environment(name, folder / "venv")
        except subprocess.CalledProcessError as error:
            print(f"{name}: could not be installed: {error}", flush=True)
            return (*first, "not installed", *["–"] * (len(HEAD) - 4)), False
        versions = installed(python)
        packages = ("torch", "triton", "python", "numpy", "open_clip_torch")
        shown = [versions.get(package, "–") for package in packages]

        print(f"{name}: testing with PyTorch {shown[0]}, Python {shown[2]}", flush=True)
        is_open_clip = name.startswith("open_clip-")
        tests = TESTS.get(name, OPEN_CLIP_TESTS if is_open_clip else (*LOSS, "tests/ranks"))
        report = folder / "report.xml"
        # Nothing that another version has compiled.
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
        }
        options = ("-q", "-rs", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider")
        command = (str(python), "-m", "pytest", *options, f"--junitxml={report}", *tests)
        start = time.monotonic()
        status = subprocess.run(command, cwd=ROOT, env=os.environ | caches).returncode
        seconds = time.monotonic() - start
        counts = count(report)
    return (*first, *shown, *counts, f"{seconds:.0f}"), status == 0


def count(report: Path) -> tuple[str, str, str]:
    """How many tests passed, failed and were skipped; dashes if pytest wrote no report."""
    if not report.exists():
        return "–", "–", "–"
    suite = next(ElementTree.parse(report).iter("testsuite"))
    total, failures, errors, skipped = (
        int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    return str(total - failed - skipped), str(failed), str(skipped)


def table(rows: list[tuple[str, ...]]) -> str:
    """The rows in Markdown, with columns aligned."""
    widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
    rule = tuple("-" * width for width in widths)
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in (HEAD, rule, *rows)
    ]
    return "\n".join(f"| {line} |" for line in lines)


def write_page(path: Path, rows: list[tuple[str, ...]]) -> None:
    """Write the rows into the page's table, in the place of older rows of their environments."""
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = [line.strip("|").split("|") for line in old if line.startswith("|")]
    cells = [tuple(map(str.strip, line)) for line in lines]  # two of the table's head
    kept = {row[0]: row for row in cells[2:] if len(row) == len(HEAD)}
    merged = kept | {row[0]: row for row in rows}
    text = f"""# Tested versions

By `make versions`. `python .ci/versions.py --help` says which tests an environment runs.

{table(list(merged.values()))}
"""
    path.write_text(text, encoding="utf-8")


def environment_name(text: str) -> str:
    """`oldest`, `lowest`, a minor version of PyTorch, or one of OpenCLIP."""
    if text not in TESTS and not re.fullmatch(r"(open_clip-)?\d+\.\d+", text):
        known = "oldest, lowest, 2.8, 2.9 ..., open_clip-2.32 ..."
        raise argparse.ArgumentTypeError(f"{text!r} is none of {known}")
    return text


def main() -> int:
    """Test in each environment, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("environments", nargs="*", type=environment_name, metavar="environment")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table here too")
    arguments = parser.parse_args()
    open_clip = f"open_clip-{lower_bound('open_clip_torch')}"
    names = arguments.environments or [*TESTS, open_clip, *minor_versions()]
    rows: list[tuple[str, ...]] = []
    all_passed = True
    try:
        for number, name in enumerate(names, 1):
            print(f"{name}: installing ({number} of {len(names)})", flush=True)
            row, passed = test(name)
            rows.append(row)
            all_passed &= passed
    finally:  # also of what was tested before Ctrl-C
        print(table(rows), flush=True)
        if arguments.output and rows:
            write_page(arguments.output, rows)
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
