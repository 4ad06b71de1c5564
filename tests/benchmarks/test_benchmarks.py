"""`gpu --dry-run` as a user would start it, and the records of all commands."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from processes import ROOT, run_python

from benchmarks import record
from benchmarks.run import Run


def test_dry_run_passes_and_leaves_both_records(tmp_path: Path) -> None:
    done = run_python(
        "-m", "benchmarks", "gpu", "--dry-run", "--out", str(tmp_path), interpreted=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RuntimeWarning" not in done.stderr
    json_file, markdown_file = sorted(tmp_path.iterdir())
    assert (json_file.suffix, markdown_file.suffix) == (".json", ".md")
    found = json.loads(json_file.read_text())
    assert found["dry_run"] is True
    assert "--dry-run" in found["command"]
    assert json_file.stem == f"cpu-{found['date']}"
    assert "DRY RUN" in markdown_file.read_text()
    assert "No failures" in markdown_file.read_text()
    sections = found["sections"]
    for name, section in sections.items():
        assert not section["failures"]
        assert section["rows"] or section["skipped"], name
    assert {row["precision"] for row in sections["operators"]["rows"]} == {
        "float32",
        "float32 (tf32)",
        "bfloat16",
        "float16",
    }


WRONG = """
import sys
from argparse import Namespace
from pathlib import Path
from cyclip_loss import kernels
from benchmarks import gpu

right = kernels.{operator}

def wrong(*arguments):
    results = right(*arguments)
    results[0].{damage}
    return results

kernels.{operator} = wrong
sections = ["operators", "synchronisation"]
sys.exit(gpu.main(Namespace(dry_run=True, out=Path(sys.argv[1]), seed=0, budget=100.0,
                            sections=sections)))
"""


@pytest.mark.parametrize(
    ("operator", "damage"),
    [
        ("contrastive_lse", "mul_(1.0001)"),
        ("contrastive_grads", "view(-1)[-1:].add_(0.01)"),
        ("cyclic_statistics", "mul_(1.001)"),
    ],
)
def test_wrong_operator_fails(tmp_path: Path, operator: str, damage: str) -> None:
    script = WRONG.format(operator=operator, damage=damage)
    done = run_python("-c", script, str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert found["sections"]["operators"]["failures"]
    # The others went on.
    assert not found["sections"]["synchronisation"]["failures"]
    assert "FAILED" in done.stdout
    assert found["sections"]["operators"]["failures"][0] in next(tmp_path.glob("*.md")).read_text()


def test_exception_fails_its_section_only(tmp_path: Path) -> None:
    run = Run(dry_run=True, seed=0, budget=10)
    with run.part("one"):
        raise RuntimeError("no\nsecond line")
    with run.part("two"):
        run.row(value=math.inf, text="a|b")
    described = record.describe(run)
    files = record.write(tmp_path, "x", described, record.markdown(described))
    sections = json.loads(files[0].read_text())["sections"]
    assert sections["one"]["failures"] == ["RuntimeError: no"]
    assert sections["two"]["failures"] == []
    assert sections["two"]["rows"] == [{"value": "inf", "text": "a|b"}]
    assert "a\\|b" in files[1].read_text()
    assert "**1 failures**" in files[1].read_text()


def test_without_a_gpu_only_a_dry_run_runs() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run_python("-m", "benchmarks", "gpu")
    assert done.returncode == 2
    assert "--dry-run" in done.stdout


def test_record_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = record.describe(Run(dry_run=True, seed=0, budget=10))
    with pytest.raises(TypeError):
        record.write(tmp_path, "x", {**described, "seed": object()}, "text")
    assert list(tmp_path.iterdir()) == []

    replace_file = os.replace

    def fails_for_markdown(source: Path, target: Path) -> None:
        if target.suffix == ".md":
            raise OSError("disk full")
        replace_file(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fails_for_markdown)
        with pytest.raises(OSError, match="disk full"):
            record.write(tmp_path, "x", described, "text")
    assert list(tmp_path.iterdir()) == []

    first = record.write(tmp_path, "x", described, "text")
    second = record.write(tmp_path, "x", described, "text")
    assert len({*first, *second}) == 4 == len(list(tmp_path.iterdir()))
    assert [files[0].stem for files in (first, second)] == ["x", "x-2"]
    assert json.loads(first[0].read_text()) == described
    assert first[1].read_text() == "text"


def test_kernels_of_a_bare_checkout() -> None:
    """Without the mapping that an installation makes of the folder `kernels/`."""
    script = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path"
        " if not getattr(finder, '__module__', '').startswith('__editable__')]\n"
        "from importlib.util import find_spec\n"
        "import cyclip_loss; assert find_spec('cyclip_loss.kernels') is None\n"
        "from benchmarks.checkout import make_kernels_importable\n"
        "make_kernels_importable(); make_kernels_importable()\n"
        "from cyclip_loss.kernels.contrastive_grads import BLOCK_BYTES\n"
        "import cyclip_loss.kernels as kernels\n"
        "assert kernels is cyclip_loss.kernels is sys.modules['cyclip_loss.kernels']\n"
        "import torch; from cyclip_loss import CyCLIPLoss\n"
        "x = torch.eye(8, requires_grad=True)\n"
        "CyCLIPLoss(impl='triton')(x, x, torch.tensor(2.0)).backward()\n"
        "print(kernels.__file__)"
    )
    done = run_python("-W", "ignore", "-c", script)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "__init__.py"
