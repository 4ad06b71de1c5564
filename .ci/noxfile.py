"""Tests with chosen versions of the dependencies, each in an environment of its own, by nox.

    nox -f .ci/noxfile.py                      all sessions, over an hour
    nox -f .ci/noxfile.py -s oldest newest     these; `-l` lists them
    nox -f .ci/noxfile.py -- PAGE              also writes a row for each session into the table of
                                               this Markdown page, in the place of an older one

`PYTEST_ADDOPTS` has further arguments for pytest. Only sessions that passed get a row. uv resolves
and installs, if there is one. When PyTorch has a new minor version, add it to `TORCH`.
"""

import os
import subprocess
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parents[1]
nox.options.default_venv_backend = "uv|virtualenv"
PYTHON = "3.10"  # the oldest
# pyenv runs `python3.10` only where version 3.10 is asked for.
os.environ["PYENV_VERSION"] = PYTHON
TORCH = ("2.8", "2.9", "2.10", "2.11", "2.12", "2.13", "2.14", "2.15")
OPEN_CLIP = "2.32"  # the oldest
LOSS = ("tests/loss", "tests/kernels")
# By its name, so that pytest fails if no test has this name.
COMPILED = "tests/ranks/test_ranks_training.py::test_compiled_and_eager_loss_are_equal"
TRAINER = ("tests/trainers/test_open_clip_train.py", "tests/trainers/test_with_penalty.py")
ALL = ("-r", "tests/requirements.txt")
COMMIT = subprocess.check_output(("git", "describe", "--always", "--dirty"), text=True).strip()
VERSIONS = """
import platform
from importlib.metadata import version

packages = ("torch", "triton", "numpy", "open_clip_torch")
print(*map(version, packages), platform.python_version(), sep=" | ")
"""


def test(session: nox.Session, requirements: tuple[str, ...], *tests: str) -> None:
    """Installs, runs the tests, and writes the row."""
    session.chdir(ROOT)
    session.install("--editable", ".", *requirements)
    command = ("python", "-m", "pytest", "-q", "-rs", "-n", "2", "--dist", "worksteal")
    summary = session.run(*command, *tests, silent=True)
    print(summary)
    versions = session.run("python", "-c", VERSIONS, silent=True)
    start = f"| {session.name} |"
    row = f"{start} {COMMIT} | {versions.strip()} | {summary.splitlines()[-1]} |"
    for page in map(Path, session.posargs):
        lines = page.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if not line.startswith(start)]
        page.write_text("\n".join([*kept, row, ""]), encoding="utf-8")


def torch_of(version: str) -> tuple[str, ...]:
    """What the tests of the loss need, with this minor version of PyTorch and its Triton."""
    # The interpreter before Triton 3.7, which PyTorch 2.13 requires, needs an older NumPy.
    numpy = ["numpy<2.4"] if TORCH.index(version) < TORCH.index("2.13") else []
    # The benchmarks require what these tests import. PyTorch for CPU brings no Triton, and
    # torch.compile of older versions imports setuptools.
    triton = "triton>=3.4; platform_system == 'Linux'"
    needed = ("-r", "benchmarks/requirements.txt", triton, "setuptools")
    return (*needed, f"torch=={version}.*", *numpy)


@nox.session(python=PYTHON)
def oldest(session: nox.Session) -> None:
    """The oldest PyTorch: loss, kernels, compiled across ranks."""
    test(session, torch_of(TORCH[0]), *LOSS, COMPILED)


@nox.session(python=PYTHON, venv_backend="uv")
def lowest(session: nox.Session) -> None:
    """The lowest version of every dependency: all tests. Only uv can resolve it."""
    test(session, ("--resolution", "lowest-direct", *ALL))


@nox.session
def open_clip(session: nox.Session) -> None:
    """The oldest OpenCLIP: its trainer and its flags."""
    session.chdir(ROOT)
    session.install(*ALL)
    test(session, (f"open_clip_torch[training]=={OPEN_CLIP}.*", "numpy<2.4"), *TRAINER)


@nox.session
@nox.parametrize("version", TORCH, ids=TORCH)
def torch(session: nox.Session, version: str) -> None:
    """Each minor version of PyTorch: loss, kernels, ranks."""
    test(session, torch_of(version), *LOSS, "tests/ranks")


@nox.session
def newest(session: nox.Session) -> None:
    """The newest version of every dependency: all tests."""
    test(session, ALL)
