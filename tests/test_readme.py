"""What the README says is so: its quickstart, its links, its keys. `python -m pytest tests/test_readme.py` (two minutes)."""

import dataclasses
import re
import subprocess
import sys

import pytest
from conftest import ROOT, Run, launcher_environment

from config import FREE_ON_RESUME, Config

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL) for line in block.splitlines()]


def test_the_two_commands_are_there():
    start = "python3 -m venv .venv && . .venv/bin/activate && pip install -r"
    assert COMMANDS[0] == f"{start} requirements.txt && deepspeed train.py --config configs/quickstart.yaml"
    assert COMMANDS[1] == f"{start} requirements-extra.txt && python -m pytest"
    assert COMMANDS[1] in (ROOT / ".ci" / "run").read_text()


def test_the_quickstart_learns_while_buying_well_under_all_labels(tmp_path):
    """The README's first command behind its install, into a folder of its own."""
    command = COMMANDS[0].split("&&")[-1].split()
    done = subprocess.run([*command, f"--output_dir={tmp_path}/run", f"--toy_dir={tmp_path}/toy"], cwd=ROOT, text=True,
                          env=launcher_environment(), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    run = Run(tmp_path / "run", done.stdout, done.stderr, 0)
    held_out = [row["rewards/accuracies"] for row in run.rows("eval")]
    summary = run.summary()
    assert held_out[0] == 0.5 and held_out[-1] == summary["eval_accuracy"] >= 0.85
    assert summary["query_fraction"] <= 0.6 and summary["queries"] == len(run.ledger())
    assert summary["pseudo_label_accuracy"] >= 0.9
    assert summary["gold_reward_after"] >= summary["gold_reward_before"] + 0.5


def test_links_and_paths_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links if not link.startswith("http"))
    for command in COMMANDS:
        for path in re.findall(r"(?:configs|benchmarks|tools|tests)/[\w./-]+\.\w+", command):
            assert (ROOT / path).exists(), path


def test_every_key_that_the_readme_names_exists():
    ours = {field.name for field in dataclasses.fields(Config)} | {"config", "Gamma", "help", "key"}
    launchers = {"num_gpus", "master_port", "hostfile"}
    tools = {"host", "export", "import", "format", "csv", "reuse", "kills", "smollm2", "hh", "profile"}
    named = set(re.findall(r"--(\w+)", README))
    assert named and named <= ours | launchers | tools


def test_what_may_differ_on_resume_is_what_the_code_lets_differ():
    table = README.partition("What may differ on resume")[2].partition("may not: exit code 2")[0]
    named = re.findall(r"`(\w+)`", table)
    assert set(named) == FREE_ON_RESUME and len(named) == len(FREE_ON_RESUME)


def test_no_core_file_imports_trl():
    for name in ("adpo", "config", "data", "oracle", "toy", "train"):
        code = (ROOT / f"{name}.py").read_text()
        assert not re.search(r"^\s*(import|from) (trl|accelerate)\b", code, flags=re.MULTILINE)
        assert not re.search(r"^(import|from) peft\b", code, flags=re.MULTILINE)  # only where an adapter is asked for


@pytest.mark.parametrize("script", ["train.py --help", "data.py"])
def test_scripts_say_how_they_are_used(script):
    done = subprocess.run([sys.executable, *script.split()], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "--config" in done.stdout or "usage: python data.py" in done.stderr
