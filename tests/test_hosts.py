"""Runs on two hosts, as two launchers on this machine: `python -m pytest tests/test_hosts.py -n 0 -m slow`."""

import subprocess

import pytest
from helpers import ROOT, Run, free_port, launcher_environment

pytestmark = pytest.mark.slow


def on_two_hosts(tiny, folder, **keys):
    """Exit codes and outputs of a run by two launchers, started as on hosts without ssh. Each has its own output_dir and
    caches."""
    (folder / "hostfile").write_text("one slots=1\ntwo slots=1\n")
    port, launchers = str(free_port()), []
    keys = {"model_name_or_path": tiny / "model", "dataset_mixer": f"{{{tiny}/pairs: 1.0}}", "learning_rate": 2e-3,
            "warmup_ratio": 0.0, "gamma": 0.2, "per_device_train_batch_size": 8, "max_prompt_length": 16, "max_length": 64,
            "max_steps": 4, "logging_steps": 1, "num_threads": 1, **keys}
    (folder / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in keys.items()))
    for n in range(2):
        command = ["deepspeed", "--hostfile", folder / "hostfile", "--no_ssh", "--node_rank", n, "--master_addr",
                   "127.0.0.1", "--master_port", port, "train.py", "--config", folder / "run.yaml",
                   f"--output_dir={folder}/{n}"]
        launchers.append(subprocess.Popen([str(word) for word in command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                          stderr=subprocess.STDOUT,
                                          env={**launcher_environment(), "HF_HOME": f"{folder}/hf-{n}"}))
    outputs = [launcher.communicate(timeout=600)[0] for launcher in launchers]
    return [launcher.returncode for launcher in launchers], outputs


def test_of_two_hosts_with_disks_of_their_own_the_first_alone_has_the_output(tiny, train, tmp_path):
    codes, outputs = on_two_hosts(tiny, tmp_path, save_strategy="no")
    assert codes == [0, 0], outputs
    one = train("one-host", processes=2)
    two = Run(tmp_path / "0", "", "", 0)
    assert two.losses() == one.losses() and two.ledger() == one.ledger()
    assert not (tmp_path / "1").exists() and not list((tmp_path / "0").glob(".*"))


def test_checkpoints_that_hosts_do_not_share_are_refused(tiny, tmp_path):
    codes, outputs = on_two_hosts(tiny, tmp_path, save_strategy="epoch")
    assert codes == [2, 2] and "is not the same folder on all hosts" in outputs[0], outputs
