"""A run's sections and its record, and what a bare checkout finds."""

import json
import math
from pathlib import Path

import pytest
from conftest import needs_triton
from processes import ROOT, run_python

from benchmarks import record
from benchmarks.run import Run


def test_exception_fails_its_section_only(tmp_path: Path) -> None:
    run = Run(dry_run=True, seed=0, budget=10)
    with run.part("one"):
        raise RuntimeError("no\nsecond line")
    with run.part("two"):
        run.row(value=math.inf, text="a|b")
        run.warn("doubtful")
    described = record.describe(run)
    files = record.write(tmp_path, "x", described, record.markdown(described))
    sections = json.loads(files[0].read_text())["sections"]
    assert sections["one"]["failures"] == ["RuntimeError: no"]
    assert sections["two"]["failures"] == []
    assert sections["two"]["rows"] == [{"value": "inf", "text": "a|b"}]
    assert record.read(files[0])["sections"]["two"]["rows"][0]["value"] == math.inf
    text = files[1].read_text()
    assert "a\\|b" in text
    assert "**1 failures**\n\n- one: RuntimeError: no" in text
    assert "- two: doubtful" in text


def test_a_record_is_written_whole_and_replaces_none(tmp_path: Path) -> None:
    described = record.describe(Run(dry_run=True, seed=0, budget=10))
    with pytest.raises(TypeError):
        record.write(tmp_path, "x", {**described, "seed": object()}, "text")
    assert list(tmp_path.iterdir()) == []
    first = record.write(tmp_path, "x", described, "text")
    second = record.write(tmp_path, "x", described, "text")
    assert len({*first, *second}) == 4 == len(list(tmp_path.iterdir()))
    assert [files[0].stem for files in (first, second)] == ["x", "x-2"]
    assert json.loads(first[0].read_text()) == described
    assert first[1].read_text() == "text"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.0938, "2.09"),
        (10634.0, "10,600"),
        (0.0605, "0.0605"),
        (2.7e-7, "2.7e-07"),
        (0.0, "0"),
        (-1234, "-1,234"),
        (math.nan, "nan"),
        ("a", "a"),
    ],
)
def test_three_digits(value: float | str, text: str) -> None:
    assert record.number(value) == text


@needs_triton
def test_kernels_of_a_bare_checkout() -> None:
    """Without the mapping that an installation makes of the folder `kernels/`."""
    script = (
        "import sys; sys.meta_path = [finder for finder in sys.meta_path"
        " if not getattr(finder, '__module__', '').startswith('__editable__')]\n"
        "from importlib.util import find_spec\n"
        "import cyclip_loss; assert find_spec('cyclip_loss.kernels') is None\n"
        "from benchmarks.checkout import make_kernels_importable\n"
        "make_kernels_importable()\n"
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
