"""What the README says is so: its quickstart, its links, its keys. `python -m pytest tests/test_readme.py` (two minutes)."""

import dataclasses
import re
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT, Run, launcher_environment

from runtime.config import FREE_ON_RESUME, Config

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


def test_the_worked_example_is_what_the_command_prints():
    done = subprocess.run([sys.executable, "adpo.py"], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert f"```sh\npython adpo.py\n```\n\n```\n{done.stdout}```\n" in README and done.stderr == ""


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_and_paths_exist(name):
    text = (ROOT / name).read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links and all((ROOT / link).exists() for link in links if not link.startswith("http"))
    for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL):
        for path in re.findall(r"(?:configs|benchmarks|tools|tests)/[\w./-]+\.\w+", block):
            assert (ROOT / path).exists(), path


def test_what_contributing_names_exists():
    """Its `names`, but for one-letter ones, are somewhere in the code."""
    code = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")])
    for name in re.findall(r"`([A-Za-z_.]+)(?:\([^`]*\))?`", (ROOT / "CONTRIBUTING.md").read_text()):
        assert name.split(".")[-1] in code, name


def test_ruff_is_clean():
    pytest.importorskip("ruff", reason="needs requirements-extra.txt")
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_lines_that_the_method_page_links_to_are_those_it_names():
    links = re.findall(r"\[`([^`]+)`\]\(\.\./(\w+\.py)#L(\d+)\)", (ROOT / "docs" / "method.md").read_text())
    assert len(links) >= 15
    for text, path, line in links:
        assert text in (ROOT / path).read_text().splitlines()[int(line) - 1], f"{path}#L{line}: {text}"


def test_every_key_that_the_readme_names_exists():
    ours = {field.name for field in dataclasses.fields(Config)} | {"config", "Gamma", "help", "key"}
    launchers = {"num_gpus", "master_port", "hostfile"}
    tools = {"host", "export", "import", "format", "csv", "reuse", "kills", "smollm2", "hh", "profile", "labels", "output",
             "follow", "questions", "compare", "model", "model_args", "tasks"}
    named = set(re.findall(r"--(\w+)", README))
    assert named and named <= ours | launchers | tools


def test_what_may_differ_on_resume_is_what_the_code_lets_differ():
    table = README.partition("What may differ on resume")[2].partition("may not: exit code 2")[0]
    named = re.findall(r"`(\w+)`", table)
    assert set(named) == FREE_ON_RESUME and len(named) == len(FREE_ON_RESUME)


CORE = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")}


def test_no_core_file_imports_trl():
    assert {"adpo", "data", "oracle", "train"} <= set(CORE)
    for code in CORE.values():
        assert not re.search(r"^\s*(import|from) (trl|accelerate)\b", code, flags=re.MULTILINE)
        assert not re.search(r"^(import|from) peft\b", code, flags=re.MULTILINE)  # only where an adapter is asked for


def test_imports_of_the_core_go_one_way_and_the_readme_names_each_file():
    imported = {name: set(re.findall(r"^\s*(?:import|from) (\w+)", code, flags=re.MULTILINE)) & set(CORE)
                for name, code in CORE.items()}
    order = list(TopologicalSorter(imported).static_order())  # raises CycleError
    assert order[-1] == "train" and imported["adpo"] == set()
    table = README.partition("## Read it")[2].partition("\n\n## ")[0]
    assert set(re.findall(r"\[(\w+)\.py\]", table)) == set(CORE)


@pytest.mark.parametrize("script", ["train.py --help", "data.py"])
def test_scripts_say_how_they_are_used(script):
    done = subprocess.run([sys.executable, *script.split()], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "--config" in done.stdout or "usage: python data.py" in done.stderr
