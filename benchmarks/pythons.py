"""Which Python and package versions the project works with: run the tests and the quickstart in several environments.

    python benchmarks/pythons.py ENV/bin/python …

Each argument is the Python of an environment that `pip install -r tests/requirements.txt` made, or of one with other
versions of those packages; the table lists the versions. The environments are tried one after the other.

Writes benchmarks/results/python.md. Exit code 1: something failed in one of them.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = [f"tests/test_{name}.py" for name in
         ("adpo", "batches", "config", "data", "ledger", "oracle", "sources", "toy")]
PACKAGES = ("torch", "transformers", "datasets", "deepspeed")
VERSIONS = ("import platform, importlib.metadata as m; "
            f"print(platform.python_version(), *(m.version(p) for p in {PACKAGES}))")


def run(command, **environment):
    print("$", *command, flush=True)
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, text=True, capture_output=True)


def row(python):
    """(a row of the table, whether everything passed) for one environment. python: path of its interpreter."""
    versions = run([python, "-c", VERSIONS]).stdout.split()
    tests = run([python, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *TESTS])
    passed = tests.stdout.splitlines()[-1].split(" in ")[0] if tests.stdout else "did not start"
    with tempfile.TemporaryDirectory() as folder:
        path = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"  # the launcher starts the first `python` on the path
        done = run([f"{Path(python).parent}/deepspeed", "train.py", "--config", "configs/quickstart.yaml",
                    f"--output_dir={folder}/run", f"--toy_dir={folder}/toy"], PATH=path, HF_HOME=f"{folder}/hf")
        quickstart = f"exit code {done.returncode}"
        if done.returncode == 0:
            summary = json.loads(Path(folder, "run", "summary.json").read_text())
            quickstart = f"{summary['queries']:,} labels, accuracy {summary['eval_accuracy']:.3f}"
    if tests.returncode or done.returncode:
        print(tests.stdout[-3000:], done.stdout[-1000:], done.stderr[-3000:])
    return f"| {' | '.join([*versions, passed, quickstart])} |", tests.returncode == done.returncode == 0


def main():
    if not sys.argv[1:]:
        sys.exit(f"usage: {__doc__.splitlines()[2].strip()}")
    rows, good = zip(*map(row, sys.argv[1:]))
    table = "\n".join([f"| Python | {' | '.join(PACKAGES)} | tests | quickstart |", "| --- " * (len(PACKAGES) + 3) + "|",
                       *rows])
    text = f"""# Python and package versions

    python benchmarks/pythons.py ENV/bin/python …

Tests: `{" ".join(TESTS)}`. Quickstart: the README's command, with the launcher. Linux x86-64, on the CPU.

{table}
"""
    (ROOT / "benchmarks" / "results" / "python.md").write_text(text)
    print(text)
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
