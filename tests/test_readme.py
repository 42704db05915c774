"""What the README and the docs say is true, and the code has the shape that they describe.

    python -m pytest tests/test_readme.py
    python -m pytest tests/test_readme.py -m slow      the quickstart: two minutes on two cores
"""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from helpers import ROOT, Run, launcher_environment, preference, tokenizer, write_folder

from runtime.config import FREE_ON_RESUME, Config
from runtime.parse import ALIASES

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL) for line in block.splitlines()]


def name_of(path):
    """adpo.py → adpo, labels/oracle.py → labels.oracle."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


TOP = {"adpo", "data", "train"}
CORE = {name_of(path): path.read_text(encoding="utf-8")
        for path in (*ROOT.glob("*.py"), *ROOT.glob("labels/*.py"), *ROOT.glob("runtime/*.py"))}
CODE = "".join(path.read_text(encoding="utf-8") for folder in (".", "labels", "runtime", "tools", "benchmarks", "tests")
               for path in sorted((ROOT / folder).glob("*.py")))


# ----------------------------------------------------------------------------------------------------------------------
# Commands

def test_the_two_commands_are_there():
    start = "python3 -m venv .venv && . .venv/bin/activate && pip install -r"
    assert COMMANDS[0] == f"{start} requirements.txt && deepspeed train.py --config configs/quickstart.yaml"
    assert COMMANDS[1] == f"{start} tests/requirements.txt && python -m pytest"
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "python -m pytest -m slow" in script[script.index(COMMANDS[1]):]


@pytest.mark.slow
def test_the_quickstart_learns_while_buying_well_under_all_labels(tmp_path):
    """The README's first command after its install, into a folder of the test. benchmarks/results/quickstart.md has how far
    other base models are from these limits."""
    command = COMMANDS[0].split("&&")[-1].split()
    done = subprocess.run([*command, f"--output_dir={tmp_path}/run", f"--toy_dir={tmp_path}/toy"], cwd=ROOT, text=True,
                          env=launcher_environment(), capture_output=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    run = Run(tmp_path / "run", done.stdout, done.stderr, 0)
    held_out = [row["rewards/accuracies"] for row in run.rows("eval")]
    summary = run.summary()
    assert held_out[0] == 0.5 and held_out[-1] == summary["eval_accuracy"] >= 0.9
    assert summary["query_fraction"] <= 0.65 and summary["queries"] == len(run.ledger())
    assert summary["pseudo_label_accuracy"] >= 0.95
    assert summary["gold_reward_after"] >= summary["gold_reward_before"] + 0.5


def test_the_worked_example_is_what_the_command_prints():
    done = subprocess.run([sys.executable, "adpo.py"], cwd=ROOT, text=True, capture_output=True, timeout=600)
    assert f"```sh\npython adpo.py\n```\n\n```\n{done.stdout}```\n" in README and done.stderr == ""


@pytest.mark.parametrize("script", ["train.py --help", "data.py", "data.py --help"])
def test_scripts_say_how_they_are_used(script):
    done = subprocess.run([sys.executable, *script.split()], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert "--config" in done.stdout + done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["train.py --help", "data.py --config {}"])
def test_what_is_printed_may_be_piped_into_head(script, tmp_path):
    tokenizer().save_pretrained(tmp_path / "model")
    source = write_folder(tmp_path / "pairs", [preference(n) for n in range(3)])
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"model_name_or_path": f"{tmp_path}/model", "dataset_mixer": {str(source): 1.0},
                                  "output_dir": f"{tmp_path}/run"}))
    command = f"{sys.executable} {script.format(config)} | head -n 1; exit $PIPESTATUS"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, text=True, capture_output=True, timeout=600)
    assert done.stdout.count("\n") == 1 and done.returncode == 0 and "BrokenPipeError" not in done.stderr


def test_ruff_is_clean():
    pytest.importorskip("ruff", reason="needs tests/requirements.txt")
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, text=True, capture_output=True,
                          timeout=600)
    assert done.returncode == 0, done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# Pages

def test_the_readme_is_short():
    assert len(README.split()) <= 1400


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []
    for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL):
        paths = re.findall(r"(?:configs|benchmarks|tools|tests)/[\w./-]+\.\w+", block)
        assert [path for path in paths if not (ROOT / path).exists()] == []


def test_what_the_docs_name_and_link_to_is_defined_there():
    """[`module.Name`](../path.py): a function, class or method of that name is in that file."""
    links = [link for page in PAGES[1:] for link in re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)\)", page.read_text())]
    assert len(links) >= 15
    for name, path in links:
        module, *names = name.split(".")
        assert path.split("/")[-1] == f"{module}.py", name
        code = (ROOT / path).read_text()
        assert all(re.search(rf"^\s*(def|class) {part}\b", code, flags=re.MULTILINE) for part in names), name


def test_what_contributing_names_exists():
    """Every `name` of more than one letter is somewhere in the code."""
    for name in re.findall(r"`([A-Za-z_.]{2,})(?:\([^`]*\))?`", (ROOT / "docs" / "contributing.md").read_text()):
        assert name.split(".")[-1] in CODE, name


def test_every_key_and_flag_that_is_named_exists():
    ours = {field.name for field in dataclasses.fields(Config)} | {*ALIASES, "config", "help", "key"}
    tools = set(re.findall(r'add(?:_argument|option)\(\s*"--([\w-]+)"', CODE))
    others = {"num_gpus", "master_port", "master_addr", "hostfile", "no_ssh", "node_rank",  # of the launcher
              "model", "model_args", "tasks",  # of lm-evaluation-harness
              "ctx-size", "n_ctx",  # of llama.cpp's servers
              "index-url"}  # of pip
    named = {flag for page in PAGES for flag in re.findall(r"(?<![\w-])--([A-Za-z][\w-]*)", page.read_text())}
    assert {"gamma", "oracle", "output_dir"} & named and named - ours - tools - others == set()


def test_what_may_differ_on_resume_is_what_the_code_lets_differ():
    page = (ROOT / "docs" / "running.md").read_text()
    table = re.search(r"What may differ on resume.*?\n\n((?:\|.*\n)+)", page)[1]
    named = re.findall(r"`(\w+)`", table)
    assert set(named) == FREE_ON_RESUME and len(named) == len(FREE_ON_RESUME)


def test_the_readme_names_what_is_there():
    part = README.partition("## The code")[2].partition("\n\n## ")[0]
    named = set(re.findall(r"\]\(([\w/.]+)\)", part))
    assert {name for name in named if name.endswith(".py")} == {f"{name}.py" for name in TOP}
    folders = {path.parent.name for path in ROOT.glob("[a-z]*/*.py")} | {"docs"}
    assert {name.rstrip("/") for name in named if not name.endswith(".py")} == folders


# ----------------------------------------------------------------------------------------------------------------------
# The shape of the code

def imports(code, everywhere):
    """Full names of the modules that a file imports: by its statements at the top level, or by all of them."""
    found = set()
    for node in ast.walk(ast.parse(code)) if everywhere else ast.parse(code).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_three_files_are_at_the_top():
    assert {path.stem for path in ROOT.glob("*.py")} == TOP


def test_no_core_file_imports_trl_accelerate_or_at_the_top_peft():
    for name, code in CORE.items():
        assert not {module.split(".")[0] for module in imports(code, everywhere=True)} & {"trl", "accelerate"}, name
        assert "peft" not in {module.split(".")[0] for module in imports(code, everywhere=False)}, name


def test_imports_go_one_way():
    """tools and benchmarks → train → labels and runtime → data and adpo; no circles; adpo imports nothing but torch."""
    graph = {name: imports(code, everywhere=False) & set(CORE) for name, code in CORE.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order[-1] == "train" and len(order) == len(CORE) > 20
    assert {module.split(".")[0] for module in imports(CORE["adpo"], everywhere=True)} == {"torch", "inspect"}
    for name, code in CORE.items():
        above = {"tools", "benchmarks", "tests"} | ({"train"} if name != "train" else set())
        assert not {module.split(".")[0] for module in imports(code, everywhere=True)} & above, name


def test_the_loop_is_one_function_that_can_be_read_at_once():
    main, = [node for node in ast.parse(CORE["train"]).body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert main.end_lineno - main.lineno + 1 <= 95
    assert not [node for node in ast.walk(main)
                if isinstance(node, (ast.FunctionDef, ast.Lambda, ast.ClassDef)) and node is not main]
    calls = [ast.unparse(node.func) for node in ast.walk(main) if isinstance(node, ast.Call)]
    assert "deepspeed.initialize" in calls
    algorithm = ["engine", "adpo.implicit_rewards", "adpo.margins", "adpo.gate", "oracle.answer", "adpo.choose_labels",
                 "adpo.preference_loss", "backward"]
    lines = {ast.unparse(node.func): node.lineno for node in ast.walk(main) if isinstance(node, ast.Call)}
    assert sorted(algorithm, key=lines.get) == algorithm
