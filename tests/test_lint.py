"""Tensors of the tests say on which device they are made, so that a GPU tests what the CPU tests.

`device="cpu"` is how a test says that it means the CPU.
"""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FACTORIES = {
    "arange", "empty", "empty_strided", "eye", "from_numpy", "full", "linspace", "logspace", "ones",
    "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip
# These make tensors on the CPU, and nothing in them knows of a GPU.
ON_THE_CPU = ("benchmarks", "reference_train", "test_pool.py")
FILES = [
    path
    for path in sorted(TESTS.rglob("*.py"))
    if path.relative_to(TESTS).parts[0] not in ON_THE_CPU
]


def without_device(source: str) -> list[str]:
    """Calls of PyTorch's factories that leave the device to PyTorch."""
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in FACTORIES
        and not any(keyword.arg in ("device", None) for keyword in node.keywords)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_tensor_says_where(path: Path) -> None:
    assert without_device(path.read_text()) == []


def test_the_lint_sees_what_it_is_for() -> None:
    source = "torch.eye(3)\ntorch.eye(3, device=device)\nx.new_ones(3)\ntorch.ones(2, dtype=y)"
    assert without_device(source) == ["line 1: torch.eye(3)", "line 4: torch.ones(2, dtype=y)"]
