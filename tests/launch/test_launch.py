"""The scripts in launch/: the commands that they would run, and mistakes reported in one line."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
from launching import FIRST, LAUNCH, SCRIPTS, SECOND, dry, end, start

from tezo_ds.cli import app

FOUR = {"NNODES": "2:4", "MASTER_ADDR": "10.0.0.1"}
YAML = LAUNCH.parent / "ds_configs" / "accelerate_fsdp2.yaml"


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("# ours\nnode1 slots=2\nnode2 slots=2\n\n")
    return path


@pytest.mark.parametrize(
    ("script", "env", "telling"),
    [
        ("single_node.sh", {}, "--master_port 29500 --log_level error --num_gpus 2"),
        ("single_node.sh", {"NPROC_PER_NODE": 3}, "--num_gpus 3"),
        ("single_node.sh", {"MASTER_PORT": 7}, "--master_port 7"),
        ("hostfile.sh", {}, "--master_port 29500 --num_nodes -1 --num_gpus -1"),
        ("hostfile.sh", FIRST, "--num_nodes 2 --num_gpus -1 --master_addr 10.0.0.1"),
        ("no_ssh.sh", SECOND, "--node_rank 1 --log_level error --master_addr 10.0.0.1"),
        ("elastic.sh", {}, "--nnodes 1:1 --nproc-per-node 2"),
        ("elastic.sh", {**FOUR, "RDZV_CONF": "join_timeout=9"}, "--rdzv-conf join_timeout=9"),
        ("elastic.sh", FOUR, "--rdzv-endpoint 10.0.0.1:29500"),
        ("accelerate.sh", {}, f"launch --config_file {YAML} --num_processes 2"),
        ("accelerate.sh", SECOND, "--num_processes 4 --num_machines 2 --machine_rank 1"),
        ("slurm.sbatch", {}, "srun --ntasks-per-node=1 --kill-on-bad-exit=1"),
        ("slurm.sbatch", {"SLURM_NNODES": 4, "NPROC_PER_NODE": 8}, "--nnodes 4 --nproc-per-node 8"),
    ],
)  # fmt: skip
def test_dry_run_prints_the_command_and_touches_nothing(
    script: str, env: dict[str, Any], telling: str, hosts: Path, tmp_path: Path
) -> None:
    run = tmp_path / "a run"
    words = dry(script, "--output", run, "--steps", 3, **{"HOSTFILE": hosts, **env})
    assert telling in " ".join(words)
    if script == "hostfile.sh":
        assert "train --output $'" in " ".join(words) and words[-2:] == ["--steps", "3"]
    else:
        assert words[-6:] == ["tezo_ds", "train", "--output", str(run), "--steps", "3"]
    assert any(word.startswith(f"{run}/logs/") for word in words) or script == "hostfile.sh"
    assert not run.exists()


@pytest.mark.parametrize(
    ("script", "env", "telling"),
    [
        ("single_node.sh", {"PYTHON_BIN_DIR": "/no"}, "no /no/python; run launch/setup.sh"),
        ("hostfile.sh", {}, "no hostfile /job/hostfile; set HOSTFILE to"),
        ("hostfile.sh", {"HOSTFILE": "/dev/null"}, "no hostfile /dev/null"),
        ("hostfile.sh", {"HOSTFILE": YAML}, "names no host; write lines such as"),
        ("hostfile.sh", {"PATH": ""}, "pdsh is missing; install it"),
        ("no_ssh.sh", {"NNODES": 2}, "NODE_RANK is not set; set it"),
        ("no_ssh.sh", {**SECOND, "NODE_RANK": 2}, "NODE_RANK is 2; set it from 0 to 1"),
        ("no_ssh.sh", {**SECOND, "NNODES": "two"}, "NNODES is 'two'; set it to a whole number"),
        ("elastic.sh", {"NNODES": 2}, "NNODES is '2'; set it to MIN:MAX"),
        ("elastic.sh", {"NNODES": "3:2"}, "NNODES is '3:2'; set it to MIN:MAX"),
        ("elastic.sh", {"MAX_RESTARTS": "many"}, "MAX_RESTARTS is 'many'; set it to a whole number"),
        ("accelerate.sh", {"NNODES": 2}, "MASTER_ADDR is not set"),
        ("accelerate.sh", {"ACCELERATE_CONFIG": "x.yaml"}, "no x.yaml; set ACCELERATE_CONFIG"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    script: str, env: dict[str, Any], telling: str, tmp_path: Path
) -> None:
    if "PATH" in env:  # all but pdsh
        for name in ("bash", "dirname", "basename", "date", "hostname", "awk", "head", "paste"):
            (tmp_path / name).symlink_to(f"/usr/bin/{name}")
        (tmp_path / "hosts").write_text("h slots=1\n")
        env = {"PATH": tmp_path, "HOSTFILE": tmp_path / "hosts"}
    code, out, err = end(start(script, "--output", tmp_path / "run", **env))
    assert (code, out) == (2, "")
    assert err.startswith(f"{script}: error: ") and err.count("\n") == 1 and telling in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_one_screen_and_say_what_they_are_for(script: str) -> None:
    lines = (LAUNCH / script).read_text().splitlines()
    code, _, err = end(start(script, "--steps", 3))
    assert (code, err.count("\n")) == (2, 1) and "error: --output is missing; name a folder" in err
    code, out, err = end(start(script, "--help"))
    assert (code, err) == (0, "")
    assert script in out and "--dry-run" in out and "#" not in out.replace("# ", "")
    assert len(lines) - len(out.splitlines()) <= 50
    assert subprocess.run(["bash", "-n", LAUNCH / script], check=False).returncode == 0


def taken(command: list[str]) -> list[str]:
    """Returns the arguments that the launcher leaves to `tezo-ds`."""
    from deepspeed.launcher.runner import parse_args
    from torch.distributed.run import get_args_parser

    if command[0].endswith("deepspeed"):
        return list(parse_args(command[1:]).user_args)
    words = command[1 + next(i for i, word in enumerate(command) if word.endswith("torchrun")) :]
    return list(get_args_parser().parse_args(words).training_script_args)


@pytest.mark.parametrize("script", ["single_node.sh", "no_ssh.sh", "elastic.sh", "slurm.sbatch"])
def test_no_flag_is_taken_for_the_launchers_own(script: str) -> None:
    """Python's argparse takes `--nu` for the beginning of `--num_gpus` or `--numa-binding`."""
    command = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    flags = [option for p in command.params for option in p.opts if option != "--output"]
    assert "--nu" in flags and len(flags) > 60
    words = dry(script, "--output", "r", *flags, **(SECOND if script == "no_ssh.sh" else {}))
    assert taken(words) == ["train", "--output", "r", *flags]
    words.remove("--")
    with pytest.raises(SystemExit):
        taken(words)


def remote(command: list[str]) -> list[str]:
    """Returns the flags that the ranks of another host get, after deepspeed, pdsh and a shell."""
    from deepspeed.launcher.multinode_runner import PDSHRunner
    from deepspeed.launcher.runner import parse_args

    words, _, _ = PDSHRunner(parse_args(command[1:]), "").get_cmd({}, {"host": [0]})
    line = " ".join(words[words.index("tezo_ds") :]).replace("%n", "0").replace("%h", "host")
    shown = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=False
    )
    return shown.stdout.split("\0")[:-1]


def test_words_survive_pdsh(hosts: Path) -> None:
    """Words survive although deepspeed quotes only those with spaces, leaves $ and backslashes in them,
    and pdsh reads %."""
    odd = ['{text} It "was" $HOME, isn\'t it', '{"a":"b c"}', "100%h `x` \\n", "é;&", "*", ""]
    flags = [word for value in odd for word in ("--template", value)]
    sent = dry("hostfile.sh", "--output", "r", *flags, HOSTFILE=hosts)
    assert remote(sent)[1:] == ["train", "--output", "r", *flags]
    plain = [*sent[: sent.index("train")], "train", "--output", "r", *flags]
    assert remote(plain)[1:] != ["train", "--output", "r", *flags]


def test_variables_travel_but_not_tokens(hosts: Path, tmp_path: Path) -> None:
    env = {
        "GLOO_SOCKET_IFNAME": "eth7",
        "NCCL_DEBUG": "INFO",
        "HF_TOKEN": "secret",
        "CUDA_VISIBLE_DEVICES": "1",
    }
    (tmp_path / ".deepspeed_env").write_text("MINE=1\n")
    code, out, _ = end(
        start("hostfile.sh", "--dry-run", "--output", "r", HOSTFILE=hosts, HOME=tmp_path, **env)
    )
    words = shlex.split(out.splitlines()[0])
    assert code == 0 and {"GLOO_SOCKET_IFNAME=eth7", "NCCL_DEBUG=INFO", "MINE=1"} <= set(words)
    assert "secret" not in out
