"""The scripts of the experiments: their commands, without running them. They would take days."""

import os
import shlex
import subprocess
import sys
from typing import Any

import pytest
from processes import ROOT

from reference_train.demo import demo
from reference_train.evaluate import evaluate
from reference_train.evaluate.checkpoints import describe_run
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


def arguments_of(commands: list[list[str]], command: str) -> list[list[str]]:
    return [line[2:] for line in commands if line[:2] == ["reference_train", command]]


def test_every_command_can_be_parsed_and_a_run_is_shown_as_its_loss(commands) -> None:
    register_models()
    known = ("pretrain", "evaluate", "report")
    for module, *argv in commands:
        assert module in {"reference_train", *MODULES}
        if module == "reference_train" and argv[0] not in known:
            demo.parse_arguments(argv)
    for argv in arguments_of(commands, "evaluate"):
        evaluate.parse_arguments(argv)
    # OpenCLIP's parser takes a while, so commands with the same flags are parsed once.
    settings: dict[tuple[str, ...], dict[str, Any]] = {}
    for argv in arguments_of(commands, "pretrain"):
        options, others = pretrain.parse(argv)
        flags = (options.loss, *(word for word in argv if word.startswith("--")))
        if flags not in settings:
            command = pretrain.launcher_command(options, others, world_size=1)
            settings[flags] = vars(pretrain.all_settings(command, rank=0, world_size=1))
        parameters = {**settings[flags], "seed": options.seed, "views": options.views}
        described = describe_run(options.name, parameters)
        assert described["loss"] == options.loss + ("-views" if options.views else "")
        assert described["seed"] == options.seed


def test_every_run_is_evaluated(commands) -> None:
    trained = {pretrain.parse(argv)[0].name for argv in arguments_of(commands, "pretrain")}
    evaluated = {
        path.name
        for argv in arguments_of(commands, "evaluate")
        for path in evaluate.parse_arguments(argv).checkpoint
    }
    assert trained == evaluated
