"""The inputs that Hypothesis draws are the same in every run."""

from pathlib import Path

from processes import run_forked

PRINT_EXAMPLES = """
import sys
sys.path[:0] = ["tests", *sys.argv[1:]]
if sys.argv[1:]:
    import constants
from hypothesis import given, settings
from inputs import cases

@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(cases())
def show(case):
    print(case.n, case.d, case.logit_scale, case.distinct_ids, case.seed)

show()
"""


def test_examples_do_not_depend_on_which_modules_are_loaded(tmp_path: Path) -> None:
    constants = [*range(100, 400), *(i + 0.25 for i in range(100)), *(2**i for i in range(7, 31))]
    (tmp_path / "constants.py").write_text(f"CONSTANTS = {constants}\n")
    alone = run_forked("-c", PRINT_EXAMPLES)
    with_constants = run_forked("-c", PRINT_EXAMPLES, str(tmp_path))
    assert len(alone.stdout.splitlines()) >= 50, alone.stderr
    assert with_constants.stdout == alone.stdout, with_constants.stderr
