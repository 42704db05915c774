"""Does a run on two hosts do what it does on one? The hosts are network namespaces of this machine; DeepSpeed's own launcher
starts the run, with a hostfile.

    python benchmarks/multinode.py [--outputs DIR] [--results FILE] [--stages N …]     as root; five minutes on two cores

Needs root and the commands ip, unshare, nsenter, ssh, sshd and pdsh (Debian: iproute2, util-linux, openssh-server, pdsh).
Each host has an address on a veth pair, and its own name, processes, mounts and sshd. The launcher on the first host starts
the ranks of both through pdsh and ssh, as it would between machines. The folder `own/` is a different disk on each host;
`shared/` is the same on both.

Two runs are compared step by step with the same two processes on one host. One has its output_dir on the first host's own
disk. The other has it in a shared folder; it is stopped through the rank on the second host and resumed by the same command.
The page also shows what is refused.

Writes benchmarks/results/multinode.md. Exit code 0: everything is as it should be; 1: something is not; 2: it could not run.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
HOSTS = {"adpo-a": "10.77.31.1", "adpo-b": "10.77.31.2"}
TOOLS = ("ip", "unshare", "nsenter", "mount", "ssh", "ssh-keygen", "sshd", "pdsh")
STEPS = 12


class Stop(Exception):
    """The benchmark cannot run; the message says why. Exit code 2."""


def sh(command, **kwargs):
    return subprocess.run(command if isinstance(command, list) else shlex.split(command), check=True, text=True, **kwargs)


def tool(name):
    """Path of a command, or None. sshd is not on every user's path."""
    return shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")


# ----------------------------------------------------------------------------------------------------------------------
# The hosts

class Hosts:
    """Two hosts, which exist inside a `with`. All their files are in `work`; the rest ends with their processes."""

    def __init__(self, work):
        self.work, self.processes = work, {}

    def __enter__(self):
        ssh = self.work / "ssh"
        ssh.mkdir()
        for name in ("host", "user"):
            sh([tool("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / name)])
        shutil.copy(ssh / "user.pub", ssh / "authorized")
        (ssh / "client.conf").write_text(f"Host *\n IdentityFile {ssh}/user\n StrictHostKeyChecking no\n"
                                         " UserKnownHostsFile /dev/null\n LogLevel ERROR\n")
        (ssh / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{at} {name}\n" for name, at in HOSTS.items()))
        (self.work / "hostfile").write_text("".join(f"{name} slots=1\n" for name in HOSTS))
        environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
                       "HF_HOME": str(self.work / "own" / "hf"), "HF_HUB_OFFLINE": "1"}
        (ssh / "server.conf").write_text(
            f"HostKey {ssh}/host\nAuthorizedKeysFile {ssh}/authorized\nStrictModes no\nUsePAM no\nPidFile none\n"
            "PermitRootLogin prohibit-password\nSetEnv " + " ".join(f"{k}={v}" for k, v in environment.items()) + "\n")
        for n, (name, address) in enumerate(HOSTS.items()):
            sh(["ip", "netns", "add", name])
            if n == 0:
                sh("ip link add adpo-veth-a type veth peer name adpo-veth-b")
            link = f"adpo-veth-{name[-1]}"
            sh(f"ip link set {link} netns {name}")
            sh(f"ip -n {name} addr add {address}/24 dev {link}")
            sh(f"ip -n {name} link set {link} up")
            sh(f"ip -n {name} link set lo up")
            disk = self.work / f"disk-{name}"
            disk.mkdir()
            script = (f"hostname {name}; mount -t tmpfs tmpfs /run; mkdir /run/sshd; mount --bind {disk} {self.work}/own; "
                      f"mount --bind {ssh}/hosts /etc/hosts; mount --bind {ssh}/client.conf /etc/ssh/ssh_config; "
                      f"exec {tool('sshd')} -D -e -f {ssh}/server.conf")
            with open(self.work / f"sshd-{name}.log", "w") as log:
                self.processes[name] = subprocess.Popen(
                    ["ip", "netns", "exec", name, "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child",
                     "--mount-proc", "sh", "-ec", script], stderr=log)
        for _ in range(100):
            ready = all("listening" in (self.work / f"sshd-{name}.log").read_text() for name in HOSTS)
            if ready:
                return self
            time.sleep(0.1)
        raise Stop("sshd does not start: " + (self.work / "sshd-adpo-a.log").read_text().strip())

    def __exit__(self, *error):
        for process in self.processes.values():
            process.kill()
            process.wait()
        for name in HOSTS:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)

    def inside(self, name):
        """The pid, on this machine, of a host's first process."""
        pid = self.processes[name].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def start(self, arguments, log):
        """Run `deepspeed` on the first host, with ranks on both. Returns the Popen."""
        command = f"cd {ROOT} && exec deepspeed --hostfile {self.work}/hostfile train.py {shlex.join(arguments)}"
        with open(log, "w") as file:
            return subprocess.Popen(["nsenter", "-t", str(self.inside("adpo-a")), "-a", "ssh", "adpo-a", command],
                                    stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def rank(self, name, output):
        """The pid, on this machine, of the rank that runs on a host and trains into `output`."""
        space = os.readlink(f"/proc/{self.inside(name)}/ns/pid")
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_text().split("\0")
                if os.readlink(path / "ns" / "pid") == space and f"--output_dir={output}" in words \
                        and "deepspeed.launcher.launch" not in words and any(w.endswith("train.py") for w in words):
                    return int(path.name)
            except OSError:  # the process has ended meanwhile
                continue
        raise Stop(f"no rank runs on {name}")


# ----------------------------------------------------------------------------------------------------------------------
# The runs

def arguments(work, output, **keys):
    keys = {"model_name_or_path": work / "inputs/model", "dataset_mixer": f"{{{work}/inputs/pairs: 1.0}}",
            "per_device_train_batch_size": 8, "max_prompt_length": 16, "max_length": 64, "max_steps": STEPS, "gamma": 0.2,
            "learning_rate": 2e-3, "warmup_ratio": 0.0, "logging_steps": 1, "eval_strategy": "no", "num_threads": 1,
            "save_strategy": "no", "deepspeed": work / "zero.json", "output_dir": output, **keys}
    return ["--config", str(ROOT / "configs" / "quickstart.yaml"), *(f"--{key}={value}" for key, value in keys.items())]


def rows(output):
    lines = (output / "metrics.jsonl").read_text().splitlines() if (output / "metrics.jsonl").is_file() else []
    return [row for row in map(json.loads, lines) if row["split"] == "train"]


def result(output):
    """What is compared: (losses, ledger, weights) of a run."""
    from safetensors.torch import load_file
    with contextlib.closing(sqlite3.connect(output / "labels.sqlite")) as db:
        ledger = db.execute("SELECT pair, label, step FROM answers ORDER BY pair").fetchall()
    return [row["loss"] for row in rows(output)], ledger, load_file(output / "model.safetensors")


def differences(ours, theirs):
    """(largest relative difference of a loss, largest absolute difference of a weight, whether the ledgers are the same)."""
    loss = max(abs(a - b) / abs(b) for a, b in zip(ours[0], theirs[0], strict=True))
    weight = max((ours[2][name] - theirs[2][name]).abs().max().item() for name in theirs[2])
    return loss, weight, ours[1] == theirs[1]


def files(folder):
    """The names of the files and checkpoints in an output_dir."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def run_stage(hosts, work, stage):
    """[(what, what was found, whether it is as it should be)] for one ZeRO stage."""
    engine = json.loads((ROOT / "ds_config.json").read_text())
    engine["zero_optimization"]["stage"] = stage
    (work / "zero.json").write_text(json.dumps(engine))
    found = []

    def show(what, value, is_so):
        found.append((f"ZeRO {stage}: {what}", value, is_so))
        print(found[-1], flush=True)

    one = work / f"one-host-{stage}"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
                   "HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1"}
    with open(work / f"one-host-{stage}.log", "w") as log:
        sh(["deepspeed", "--num_gpus", "2", "--master_port", "29731", "train.py", *arguments(work, one)], cwd=ROOT,
           env=environment, stdout=log, stderr=log)
    reference = result(one)

    own = work / "own" / f"run-{stage}"
    code = hosts.start(arguments(work, own), work / f"own-{stage}.log").wait(timeout=400)
    disks = [work / f"disk-{name}" for name in HOSTS]
    show("output_dir on the first host's own disk: exit code", f"{code}", code == 0)
    loss, weight, same = differences(result(disks[0] / own.name), reference)
    show("… compared with one host: largest relative difference of a loss, largest difference of a weight, ledgers",
         f"{loss:.1e}, {weight:.1e}, {'the same' if same else 'different'}", loss < 1e-5 and weight < 1e-4 and same)
    here, there = files(disks[0] / own.name), files(disks[1] / own.name)
    show("… in output_dir on the first host", ", ".join(here), {"labels.sqlite", "model.safetensors"} <= set(here))
    show("… on the second host's disk, besides the caches in its HF_HOME", ", ".join(there) or "nothing", not there
         and files(disks[1]) == ["hf"])

    log = work / f"refused-{stage}.log"
    code = hosts.start(arguments(work, own.with_name("refused"), save_strategy="epoch"), log).wait(timeout=400)
    words = [line.partition("error: ")[2] for line in log.read_text().splitlines() if "error: " in line] or [""]
    show("checkpoints on such a disk are refused: exit code, message", f"{code}, {words[0]}",
         code == 2 and "not the same folder on all hosts" in words[0])

    shared = work / "shared" / f"run-{stage}"
    command = arguments(work, shared, save_strategy="steps", save_steps=4)
    run = hosts.start(command, work / f"shared-{stage}.log")
    while run.poll() is None and len(rows(shared)) < 5:
        time.sleep(0.02)
    os.kill(hosts.rank("adpo-b", shared), signal.SIGTERM)
    code, stopped = run.wait(timeout=400), len(rows(shared))
    show(f"output_dir on a shared disk, SIGTERM to the rank on {list(HOSTS)[1]}: exit code, steps done, checkpoints",
         f"{code}, {stopped}, {', '.join(name for name in files(shared) if name.startswith('checkpoint'))}",
         code == 75 and stopped < STEPS)
    code = hosts.start(command, work / f"resumed-{stage}.log").wait(timeout=400)
    loss, weight, same = differences(result(shared), reference)
    resumed = "resumed from" in (work / f"resumed-{stage}.log").read_text()
    show("the same command again: exit code, whether it resumed, and the comparison with one host",
         f"{code}, {'yes' if resumed else 'no'}, {loss:.1e}, {weight:.1e}, {'the same' if same else 'different'}",
         code == 0 and resumed and loss < 1e-5 and weight < 1e-4 and same)
    code = hosts.start(command, work / f"again-{stage}.log").wait(timeout=400)
    show("the same command once more, after the run has finished: exit code", f"{code}", code == 0)
    return found


def main(options):
    missing = [name for name in TOOLS if not tool(name)]
    if missing or os.geteuid() != 0:
        raise Stop(f"needs {', '.join(missing)}" if missing else "needs root, to make network namespaces")
    work = options.outputs.absolute()
    shutil.rmtree(work, ignore_errors=True)
    for name in ("inputs", "own", "shared"):
        (work / name).mkdir(parents=True)
    from runtime import toy
    toy.write_untrained(work / "inputs", {"pairs/train.jsonl": 120, "pairs/test.jsonl": 40})  # both hosts see this folder
    found = []
    with Hosts(work) as hosts:
        for stage in options.stages:
            found += run_stage(hosts, work, stage)
    text = ["# Two hosts", "", "Made by `python benchmarks/multinode.py`. The hosts are two network namespaces on one "
            "machine, each with its own address, name, processes, mounts and sshd. Each runs one rank; `deepspeed "
            f"--hostfile` on the first starts both (pdsh over ssh). {STEPS} steps of 16 pairs, in fp32 on the CPU, over "
            "gloo. \"One host\" means the same two ranks, started by `deepspeed --num_gpus 2`.", "",
            "| | found | as it should be |", "| --- | --- | --- |"]
    text += [f"| {what} | {value} | {'yes' if is_so else '**no**'} |" for what, value, is_so in found]
    options.results.write_text("\n".join(text).replace(str(work) + "/", "") + "\n")
    print(options.results.read_text())
    return 0 if all(is_so for *_, is_so in found) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs" / "multinode")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "multinode.md")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3], help="ZeRO stages to try; default: 2 3")
    try:
        sys.exit(main(parser.parse_args()))
    except Stop as error:
        print(f"benchmarks/multinode.py: {error}", file=sys.stderr)
        sys.exit(2)
