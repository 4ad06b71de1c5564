"""The scripts of the experiments: their commands, without running them. They would take days."""

import os
import shlex
import subprocess
import sys

import pytest
from processes import ROOT

from cyclip_loss import open_clip_train
from reference_train.demo import demo
from reference_train.evaluate import evaluate
from reference_train.pretrain import pretrain
from reference_train.pretrain.presets import register_models

MODULES = ("reference_train.data.icons", "reference_train.siglip_table")


@pytest.fixture(scope="module", params=["icons.sh", "views.sh", "siglip.sh"])
def commands(request, tmp_path_factory) -> list[list[str]]:
    """The arguments of each `python` that the script runs, after "-m reference_train"."""
    folder = tmp_path_factory.mktemp("script")
    stub = folder / "python"
    stub.write_text(
        f"#!{sys.executable}\n"
        "import os, pathlib, shlex, sys\n"
        "arguments = sys.argv[1:]\n"
        "with open('commands', 'a') as file:\n"
        "    file.write(shlex.join([os.environ['CUDA_VISIBLE_DEVICES'], *arguments]) + '\\n')\n"
        "if 'pretrain' in arguments:\n"
        "    out, name = (arguments[arguments.index(flag) + 1] for flag in ('--out', '--name'))\n"
        "    pathlib.Path(out, name).mkdir(parents=True)\n"
    )
    stub.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    script = ROOT / "reference_train" / request.param
    subprocess.run(["sh", str(script)], cwd=folder, env={**os.environ, "PATH": path}, check=True)
    lines = [shlex.split(line) for line in (folder / "commands").read_text().splitlines()]
    assert all(line[:2] == ["", "-m"] for line in lines)  # no GPU, and modules only
    return [line[2:] for line in lines]


def test_every_command_can_be_parsed_and_every_run_is_evaluated(commands) -> None:
    register_models()
    trained, evaluated = set(), set()
    for module, *argv in commands:
        assert module in {"reference_train", *MODULES}
        if module != "reference_train" or argv[0] == "report":
            continue
        if argv[0] == "pretrain":
            options, others = pretrain.parse(argv[1:])
            command = pretrain.launcher_command(options, others, world_size=1)
            pretrain.parse_with(open_clip_train.parse, command)
            trained.add(options.name)
        elif argv[0] == "evaluate":
            evaluated |= {path.name for path in evaluate.parse_arguments(argv[1:]).checkpoint}
        else:
            demo.parse_arguments(argv)
    assert trained == evaluated
