"""`pretrain`: a run resumes with the settings that it was begun with."""

import json
import os
import subprocess

import pytest
import torch
from pages import blocks

from cyclip_loss.options import PRESETS
from reference_train import runs
from reference_train.command_line import UsageError
from reference_train.pretrain import pretrain as command

pytest_plugins = ["pretraining"]


COMPARED = """
lr lr_scheduler lr_cooldown_end wd beta1 beta2 eps opt warmup batch_size accum_freq precision model
force_quick_gelu pretrained lock_image seed aug_cfg image_mean grad_clip_norm train_num_samples
train_shards val_shards dataset_resampled siglip same_captions
"""


@pytest.fixture
def resume_run(dry_run, tmp_path):
    """Resumes a run of one epoch with other flags, as far as --dry-run goes.

    begun_with: the settings in its params.txt that differ from those of the flags.
    """
    same = "--name run -- --workers 1 --force-image-size 32"
    settings = {**vars(dry_run(same)), "force_image_size": 32, "rank": 0, "world_size": 1}
    run = tmp_path / "logs" / "run"
    (run / "checkpoints").mkdir(parents=True)
    torch.save({"epoch": 1}, run / "checkpoints" / "epoch_latest.pt")

    def again(flags="", ours="", **begun_with):
        lines = [f"{name}: {value}\n" for name, value in {**settings, **begun_with}.items()]
        (run / "params.txt").write_text("".join(lines))
        return dry_run(f"{ours} {same} {flags}")

    return again


def test_a_resumed_run_refuses_another_setting_of_model_data_loss_or_optimiser(resume_run):
    with pytest.raises(UsageError, match="begun with views = None, not own: choose another"):
        resume_run(ours="--views own")
    with pytest.raises(UsageError, match="begun with loss = None, not math:dist: choose another"):
        resume_run(ours="--loss math:dist")
    with pytest.raises(UsageError, match=r"begun with lambda_inmodal = 0.0, not 0.25: choose"):
        resume_run(ours="--loss cyclip")
    for name in COMPARED.split():
        with pytest.raises(UsageError, match=f"begun with {name} = x, not .*: choose another"):
            resume_run(**{name: "x"})
    with pytest.raises(UsageError, match="begun with epochs = 3, not 5"):  # it has finished one
        resume_run("--epochs 5", epochs=3)


def test_a_resumed_run_compares_the_values_of_penalties_and_not_their_preset(resume_run):
    """Values of penalties without weight do not matter."""
    resume_run(reference_batch_size=32, centered=True, lambda_progress=True)
    values = {"lambda_inmodal": 0.25, "lambda_crossmodal": 0.25, **PRESETS["strong"]}
    resume_run(ours="--loss cyclip --penalties strong", penalties="custom", **values)
    flags = "--loss cyclip --penalties strong --reference-batch-size 64"
    with pytest.raises(UsageError, match="begun with reference_batch_size = 128, not 64: choose"):
        resume_run(ours=flags, **values)


def test_an_unlisted_flag_is_compared_and_listed_ones_may_differ(resume_run, monkeypatch):
    """A new version of OpenCLIP may add such a flag."""
    resume_run("--log-every-n-steps 3 --grad-checkpointing --workers 2 --debug --val-frequency 2")
    parse_args = command.trainer.parse_args

    def with_new_flag(flags):
        args = parse_args(flags)
        args.brand_new_flag = 2
        return args

    monkeypatch.setattr(command.trainer, "parse_args", with_new_flag)
    resume_run()  # the version that began the run did not have the flag
    resume_run(brand_new_flag=2)
    with pytest.raises(UsageError, match="begun with brand_new_flag = 1, not 2: choose another"):
        resume_run(brand_new_flag=1)


def test_another_number_of_ranks_is_refused(resume_run, monkeypatch):
    """Only the first rank prints."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert resume_run(batch_size=4, world_size=2) is None
    with pytest.raises(UsageError, match="begun with world_size = 1, not 2: choose another"):
        resume_run(batch_size=4)


def results(out):
    """The validations of the run."""
    lines = (out / "run" / "checkpoints" / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def finished(pretrain, capsys):
    """The last line that a run of one epoch printed."""
    pretrain()
    return capsys.readouterr().out.splitlines()[-1]


def test_a_finished_run_says_its_best_epoch_and_is_not_trained_again(
    finished, pretrain, tmp_path, capsys
):
    [line] = results(tmp_path)
    assert {"inmodal_gap", "crossmodal_gap"} <= line.keys()
    best = f"the best was 1, clip_val_loss {line['clip_val_loss']:.4f}"
    assert finished.endswith(f"/run: finished, 1 epochs; {best}")
    pretrain()
    assert capsys.readouterr().out.endswith(f"{finished}; nothing left to do\n")
    assert results(tmp_path) == [line]


def test_the_code_on_the_page_loads_the_best_epoch(finished, tmp_path):
    (code,) = blocks("docs/pretraining.md")
    code = code.replace("logs/icons-cyclip-0", str(tmp_path / "run"))
    exec(code.replace("icons-rn-32", "tiny"), names := {})
    best = torch.load(tmp_path / "run/checkpoints/best.pt", weights_only=True)
    torch.testing.assert_close(dict(names["model"].state_dict()), dict(best["state_dict"]))


def test_a_finished_run_takes_more_epochs_and_data_that_moved(
    finished, pretrain, data, tmp_path, monkeypatch
):
    checkpoints = tmp_path / "run" / "checkpoints"
    monkeypatch.chdir(data.rename(tmp_path / "moved"))
    pretrain("--epochs 2", data=".")
    assert [line["epoch"] for line in results(tmp_path)] == [1, 2]
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {"best.pt", "epoch_1.pt", "epoch_2.pt", "epoch_latest.pt", "results.jsonl"}


def test_a_run_records_the_commits_of_its_code(pretrain, tmp_path, monkeypatch):
    for epochs, version in ((1, "a clean"), (2, "b dirty"), (3, "b dirty"), (3, "c clean")):
        monkeypatch.setattr(command, "code_version", lambda version=version: version)
        pretrain(f"--epochs {epochs}")
    assert runs.read_parameters(tmp_path / "run" / "params.txt")["commit"] == "a clean, b dirty"


def test_the_commit_is_of_code_that_git_tracks(tmp_path, monkeypatch):
    file = tmp_path / "code.py"
    for module in (runs, runs.cyclip_loss):
        monkeypatch.setattr(module, "__file__", str(file))
    file.touch()
    for arguments in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm files"):
        assert runs.code_version() is None
        subprocess.run(["git", "-C", tmp_path, *arguments.split()], check=True)
    version = str(runs.code_version())
    file.write_text("changed")
    assert (len(version), runs.code_version()) == (40, f"{version} dirty")


def test_a_run_refuses_other_data_and_a_damaged_checkpoint(finished, pretrain, data, tmp_path):
    shard = data / "train-00003.tar"
    content = shard.read_bytes()
    shard.write_bytes(content + bytes(512))
    with pytest.raises(UsageError, match=r"begun with train_shards = 4 shards, .* not 4 shards, "):
        pretrain("--workers 0")
    shard.write_bytes(content)
    os.truncate(tmp_path / "run" / "checkpoints" / "epoch_latest.pt", 10_000)
    with pytest.raises(UsageError, match=r"epoch_latest.pt was not loaded: truncated, or "):
        pretrain("--workers 0")
