"""Break the code at random places, one at a time, and see which faults the tests notice.

    python tests/faults.py --seed 1 cyclip_loss kernels

The seed decides the kind of each fault, and then its place. Each fault is put into a copy of the
project, and the folder's tests run there. A fault that no test notices is printed as SURVIVED. Then
the tests have a hole, or no user could notice the fault, or it needs a device that is not here.
"""

import argparse
import ast
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, TimeoutExpired, call

ROOT = Path(__file__).parents[1]
# The laws of the loss come first: they notice most faults, and soon.
CORE = [
    "tests/loss/test_properties.py",
    "tests/loss",
    "tests/kernels",
    "tests/ranks",
    "tests/trainers",
]
TESTS = {name: [f"tests/{name}"] for name in ("reference_train", "benchmarks")}
TESTS |= dict.fromkeys(("cyclip_loss", "kernels"), CORE)
NOT_COPIED = shutil.ignore_patterns(".*", "runs", "build")
PAIRS = [(ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot)]
PAIRS += [(ast.In, ast.NotIn), (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.And, ast.Or)]
SWAPS = {a: b for x, y in PAIRS for a, b in ((x, y), (y, x))}
SWAPS |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult}
CONVERSIONS = ("contiguous", "to", "detach", "clone", "float", "double", "clamp", "abs", "strip")
# Fields of the syntax tree, and arguments, that get no faults.
NO_BEHAVIOUR = ("annotation", "returns", "decorator_list", "exc")
MESSAGES = ("help", "metavar", "description", "epilog", "stacklevel", "strict")


def changed(node: ast.AST, **fields: object) -> ast.AST:
    return type(node)(**vars(node) | fields)


def possible_faults(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yields each fault that the node can have: its kind, and the node with the fault."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            yield "comparison", changed(node, ops=[SWAPS[type(op)]()])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in SWAPS:
            yield "operator", changed(node, op=SWAPS[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield "sign or not", node.operand
        case ast.Constant(value=bool()):
            yield "flag", ast.Constant(not node.value)
        case ast.Constant(value=int() | float() as value):
            yield "number", ast.Constant(value + 1 if isinstance(value, int) else 2 * value or 1.0)
        case ast.If() | ast.IfExp() | ast.While():
            yield "condition", changed(node, test=ast.UnaryOp(ast.Not(), node.test))
        case ast.Slice():
            for end in [end for end in ("lower", "upper") if getattr(node, end)]:
                yield "bound left out", changed(node, **{end: None})
        case ast.Raise() | ast.AugAssign() | ast.Expr(value=ast.Call()):
            yield "statement left out", ast.Pass()
        case ast.Call(args=args, keywords=keywords):
            for k in [k for k in keywords if k.arg and k.arg not in MESSAGES]:
                yield "argument left out", changed(node, keywords=[x for x in keywords if x != k])
            if len(args) > 1:
                yield "arguments swapped", changed(node, args=[args[1], args[0], *args[2:]])
            if isinstance(node.func, ast.Attribute) and node.func.attr in CONVERSIONS:
                yield "conversion left out", node.func.value


def break_each(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Puts one fault at a time into a tree. Yields the fault's kind, and its line and text."""
    for name, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        for index, child in enumerate(children if name not in NO_BEHAVIOUR else ()):
            if not isinstance(child, ast.AST) or getattr(child, "arg", None) in MESSAGES:
                continue
            for kind, new in possible_faults(child):
                changed_children = [*children[:index], new, *children[index + 1 :]]
                setattr(node, name, changed_children if children is value else new)
                texts = (ast.unparse(x).split("\n")[0][:70] for x in (child, new))
                yield kind, f"{child.lineno} {kind}: {'  ->  '.join(texts)}"
                setattr(node, name, value)
            yield from break_each(child)


def noticed(file: Path, source: str) -> bool:
    """Whether a test fails, or hangs, if a file has this source."""
    with tempfile.TemporaryDirectory() as folder, suppress(TimeoutExpired):
        project = shutil.copytree(ROOT, f"{folder}/project", symlinks=True, ignore=NOT_COPIED)
        (project / file).write_text(source)
        command = [sys.executable, "-m", "pytest", "-qx", "-n", "2", "--hypothesis-profile=faults"]
        command += TESTS[file.parts[0]]
        environment = os.environ | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
        return call(command, cwd=project, env=environment, timeout=1200, stdout=DEVNULL) != 0
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", choices=TESTS)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=40)
    options = parser.parse_args()
    for folder in options.folders:
        file = next((ROOT / folder).glob("*.py")).relative_to(ROOT)
        assert not noticed(file, (ROOT / file).read_text()), f"the tests of {folder} fail already"
    places, killed, draw = {}, 0, random.Random(options.seed)
    files = [f for folder in options.folders for f in sorted((ROOT / folder).rglob("*.py"))]
    # `cyclip_loss/kernels` is a link to `kernels`.
    for path in [f for f in files if f.resolve() == f.absolute()]:
        tree = ast.parse(path.read_text())
        for kind, text in break_each(tree):
            places.setdefault(kind, []).append((path.relative_to(ROOT), text, ast.unparse(tree)))
    for _ in range(options.count):
        kind = draw.choice(sorted(kind for kind in places if places[kind]))
        file, text, source = places[kind].pop(draw.randrange(len(places[kind])))
        is_noticed = noticed(file, source)
        killed += is_noticed
        print("killed" if is_noticed else "SURVIVED", f"{file}:{text}", flush=True)
    print(f"{killed} of {options.count} killed")


if __name__ == "__main__":
    main()
