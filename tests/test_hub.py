"""The model card and its upload to the hub, which is played by a server on this machine that speaks the hub's protocol.

    python -m pytest tests/test_hub.py -n 0

The client is huggingface_hub's own. What the server receives is compared with the run's folder byte by byte.
"""

import base64
import errno
import hashlib
import importlib.util
import json
import shlex
import subprocess
import sys
import textwrap
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest
import transformers
import yaml
from helpers import ROOT, errors, free_port, launcher_environment
from huggingface_hub import ModelCard, constants

from labels.oracle import wilson
from runtime import card, curves
from runtime.config import Config, is_repo_id

TOKEN = "hf_" + "x" * 34
SENT = {"README.md", "config.json", "curves.png", "generation_config.json", "metrics.jsonl", "model.safetensors",
        "summary.json", "tokenizer.json", "tokenizer_config.json"}


class Hub(BaseHTTPRequestHandler):
    """The requests of create_repo, create_branch and upload_folder, as huggingface.co answers them."""

    def log_message(self, *args):
        pass

    def reply(self, status, body=None, **headers):
        content = json.dumps(body or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        """Whether a branch exists, which `hf upload` asks; and who the user is, after a repository could not be made."""
        self.server.hub.requests.append(self.path)
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "Invalid user token."}, X_Error_Message="Invalid user token.")
        kind, user, model, what, branch = self.path.removeprefix("/api/").split("/")
        assert (kind, what) == ("models", "revision")
        known = unquote(branch) in self.server.hub.branches[f"{user}/{model}"]
        self.reply(*(200, {"id": f"{user}/{model}", "siblings": []}) if known else (404,),
                   **({} if known else {"X_Error_Code": "RevisionNotFound"}))

    def do_PUT(self):
        """The content of a large file, sent to the address that the batch named, without a token."""
        hub, content = self.server.hub, self.rfile.read(int(self.headers["Content-Length"]))
        hub.requests.append(self.path)
        assert self.path == f"/lfs/{hashlib.sha256(content).hexdigest()}"
        hub.large[self.path.removeprefix("/lfs/")] = content
        self.reply(200)

    def do_POST(self):
        hub, body = self.server.hub, self.rfile.read(int(self.headers["Content-Length"]))
        hub.requests.append(self.path)
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "Invalid user token."}, X_Error_Message="Invalid user token.")
        path = self.path.removeprefix("/api/")
        lines = [json.loads(line) for line in body.splitlines()] if path.partition("/commit/")[1] else [json.loads(body)]
        if path == "repos/create":
            name = f"{lines[0]['organization'] or 'somebody'}/{lines[0]['name']}"
            known = name in hub.branches
            hub.branches.setdefault(name, {"main"})
            return self.reply(409 if known else 200, {"name": name, "url": f"{hub.url}/{name}"})
        if path == "validate-yaml":
            problem = what_the_hub_refuses(lines[0]["content"])
            return self.reply(400 if problem else 200, {"errors": [{"message": problem}] if problem else [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            if hub.full:
                return self.reply(403, {"error": "storage limit reached"}, X_Error_Message="storage limit reached")
            return self.reply(200, {"transfer": "basic", "objects": [
                {**item, "actions": {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}} for item in lines[0]["objects"]]})
        kind, user, model, what, branch = path.split("/")
        name, branch = f"{user}/{model}", unquote(branch)
        assert kind == "models" and name in hub.branches
        if what == "branch":
            known = branch in hub.branches[name]
            hub.branches[name].add(branch)
            return self.reply(409 if known else 200)
        if branch not in hub.branches[name]:
            return self.reply(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        if what == "preupload":
            return self.reply(200, {"files": [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"}
                for file in lines[0]["files"]]})
        assert what == "commit"
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                hub.files[name, branch, value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[name, branch, value["path"]] = hub.large[value["oid"]]
        self.reply(200, {"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1" * 40})


def what_the_hub_refuses(card):
    """Which of the hub's rules for front matter this card breaks, of those that ours could break; None if it breaks none."""
    front = yaml.safe_load(card.split("---\n")[1])
    for name in (*front.get("datasets", []), *filter(None, [front.get("base_model")])):
        if not is_repo_id(name):
            return f"{name} is not an id"
    try:
        ModelCard(card)  # reads model-index too
    except ValueError as error:
        return str(error)


@pytest.fixture
def hub(monkeypatch):
    """A hub, and a user who is logged in to it, in this process and in those that it starts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.hub = types.SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", requests=[], branches={}, large={},
                                       files={}, full=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in (("HF_TOKEN", TOKEN), ("HF_ENDPOINT", server.hub.url), ("HF_HUB_OFFLINE", "0"),
                        ("HF_HUB_DISABLE_XET", "1")):  # xet is another protocol, whose server is not public
        monkeypatch.setenv(name, value)
    for name, value in (("ENDPOINT", server.hub.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(constants, name, value)  # what huggingface_hub read of them when it was imported
    yield server.hub
    server.shutdown()
    server.server_close()


def sent(hub, name, branch):
    """{path: content} of a branch."""
    return {path: content for (*where, path), content in hub.files.items() if where == [name, branch]}


@pytest.mark.slow
def test_exactly_the_models_files_arrive_and_as_they_are(hub, train, tmp_path):
    """With two processes, checkpoints, a monitor's files and other files in the folder."""
    output = tmp_path / "run"
    output.mkdir()
    for name in ("questions.jsonl", ".env", "notes.md"):
        (output / name).write_text("not the run's")
    run = train("pushed", processes=2, output_dir=output, push_to_hub=True, hub_model_id="someone/aligned",
                hub_model_revision="v2/β", save_strategy="steps", save_steps=2, report_to="csv_monitor", max_steps=2)
    assert "uploaded to http://127.0.0.1" in run.stdout and "/someone/aligned, branch v2/β" in run.stdout
    assert (output / "checkpoint-2").is_dir() and (output / "csv").is_dir() and (output / "labels.sqlite").is_file()
    files = sent(hub, "someone/aligned", "v2/β")
    assert len(hub.files) == len(files) and files.keys() == SENT
    for name, content in files.items():
        assert content == (output / name).read_bytes(), name
    assert TOKEN not in run.stdout + run.stderr
    assert not [path for path in output.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_nothing_is_sent_unasked(hub, train):
    train("quiet", max_steps=1)
    assert hub.requests == []


def test_a_model_without_a_name_takes_the_folders_and_the_users(hub, train, tmp_path):
    train("named", output_dir=tmp_path / "my-model", push_to_hub=True, max_steps=1)
    assert sent(hub, "somebody/my-model", "main").keys() == SENT


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device", "/cache")


def pressed(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("harm, problem", [
    (lambda hub, patch: patch.setattr(huggingface_hub.HfApi, "upload_folder", pressed), "KeyboardInterrupt"),
    (lambda hub, patch: patch.setenv("HF_TOKEN", "hf_wrong"), "Invalid user token."),
    (lambda hub, patch: patch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}"), "Connection refused"),
    (lambda hub, patch: setattr(hub, "full", True), "storage limit reached"),
    (lambda hub, patch: patch.setattr(huggingface_hub.HfApi, "upload_folder", no_space), "No space left on device"),
])
def test_an_upload_that_fails_loses_nothing_and_can_be_made_by_hand(harm, problem, hub, train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        harm(hub, patch)
        run = train("failed", output_dir=tmp_path / "model", push_to_hub=True, hub_model_revision="v1", max_steps=1, check=2)
    assert len(errors(run)) == 1 and problem in errors(run)[0] and "not uploaded to " in errors(run)[0]
    assert not hub.files and run.summary()["queries"] == 8
    transformers.AutoModelForCausalLM.from_pretrained(run.output)
    hub.full = False
    by_hand = shlex.split(errors(run)[0].partition("to upload it: ")[2])
    assert by_hand[:2] == ["hf", "upload"]
    if problem != "Invalid user token.":  # once is enough: the command is the same
        return
    done = subprocess.run([Path(sys.executable).parent / "hf", *by_hand[1:]], env=launcher_environment(), text=True,
                          capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    files = sent(hub, "somebody/model", "v1")
    assert files.keys() == SENT and files["model.safetensors"] == (run.output / "model.safetensors").read_bytes()


@pytest.mark.parametrize("harm, keys, problem", [
    (lambda patch: patch.delenv("HF_TOKEN"), {}, "push_to_hub needs a login"),
    (lambda patch: patch.setattr(constants, "HF_HUB_OFFLINE", True), {}, "HF_HUB_OFFLINE is set"),
    (lambda patch: None, {"hub_model_id": "a/b/c"}, "a/b/c cannot be the name of a model on the hub"),
])
def test_an_upload_that_cannot_succeed_is_refused_before_the_run(harm, keys, problem, hub, train, monkeypatch):
    harm(monkeypatch)
    run = train("refused", push_to_hub=True, check=2, **keys)
    assert len(errors(run)) == 1 and problem in errors(run)[0]
    assert not run.output.exists() and hub.requests == []


# ----------------------------------------------------------------------------------------------------------------------
# The card

SUMMARY = {"pairs": 2000, "queries": 500, "query_fraction": 0.25, "queries_without_preference": 0, "pseudo_labels": 1500,
           "pseudo_label_accuracy": 0.9,
           "pseudo_label_interval": list(wilson(1350, 1500)), "audited": 0, "audit_accuracy": None,
           "audit_interval": None, "cost": None, "eval_accuracy": 0.71249}


def card_of(config, command_line=None, pictures=(), **summary):
    text = card.model_card(Config(**{"model_name_or_path": "org/base", "dataset_mixer": {"org/pairs": 0.5},
                                     "output_dir": "runs/mine", **config}), SUMMARY | summary, command_line, pictures)
    assert what_the_hub_refuses(text) is None
    return text


def test_the_card_says_what_the_run_was(tmp_path):
    text = card_of({"gamma": 0.7}, "deepspeed train.py --config x.yaml --gamma=0.7", ["curves.png"], audited=100,
                   audit_accuracy=0.95, audit_interval=[0.9, 0.98], cost=12.5)
    for line in ("| data | 50 % of `org/pairs` |", "| labels bought | 500 (25.0%) |", "| spent on labels | 12.50 |",
                 "| pseudo-labels | 1,500, 90.0% of them right (95 % interval 88.4% to 91.4%) |",
                 "| audited pseudo-labels | 100, 95.0% of them right (95 % interval 90.0% to 98.0%) |",
                 "| held-out accuracy of the implicit reward | 0.712 |", "| β, γ | 0.1, 0.7 |", "# `mine`",
                 "```sh\ndeepspeed train.py --config x.yaml --gamma=0.7\n```"):
        assert f"\n{line}\n" in text
    assert "](curves.png)" in text and yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["gamma"] == 0.7
    assert "\n| spent on labels | at least 12.50 |\n" in card_of({}, cost=12.5, cost_incomplete=True)
    data = ModelCard(text).data
    assert (data.base_model, data.datasets, data.library_name, data.pipeline_tag) == (
        "org/base", ["org/pairs"], "transformers", "text-generation")
    [result] = data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("org/pairs", "accuracy", 0.7125)


def test_paths_are_not_taken_for_names_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "pairs.jsonl").write_text("")
    data = ModelCard(card_of({"model_name_or_path": str(tmp_path),
                              "dataset_mixer": {str(tmp_path / "pairs.jsonl"): 1.0}})).data
    assert data.base_model is None and data.datasets is None and not data.eval_results
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base").mkdir(parents=True)
    assert ModelCard(card_of({})).data.base_model is None  # a path that looks like an id
    both = ModelCard(card_of({"dataset_mixer": {"org/a": 1.0, str(tmp_path): 1.0}})).data
    assert both.datasets == ["org/a"] and not both.eval_results  # nobody could tell which source the accuracy is of


@pytest.mark.parametrize("keys, method, gate, tags", [
    ({}, "Active Direct Preference Optimization ([arXiv 2402.09401](https://arxiv.org/abs/2402.09401)), which asks for a "
         "label only where the policy is unsure", "1.3", ["adpo", "dpo", "preference-learning"]),
    ({"data_selection": False}, "Direct Preference Optimization ([arXiv 2305.18290](https://arxiv.org/abs/2305.18290))",
     "every pair asked", ["dpo", "preference-learning"]),
    ({"label_budget": 0.25}, "Direct Preference Optimization ([arXiv 2305.18290](https://arxiv.org/abs/2305.18290)), from a "
     "budget of labels", "no gate: label_budget 0.25", ["dpo", "preference-learning"])])
def test_the_card_names_the_method_that_was_used(keys, method, gate, tags):
    text = card_of(keys, committee=True)
    assert f"\n| β, γ | 0.1, {gate} |\n" in text
    assert f"\nTrained from `org/base` with {method}.\n" in text and ModelCard(text).data.tags == tags


def test_what_is_not_known_is_not_in_the_card():
    text = card_of({"oracle": "human"}, pseudo_label_accuracy=None, pseudo_label_interval=None, eval_accuracy=None)
    assert "| pseudo-labels | 1,500 |" in text and "| not measured |" in text and "| annotator | human |" in text
    assert not any(word in text for word in ("curves.png", "The command", "spent on", "audited", "model-index"))


def test_nothing_in_a_card_breaks_it_or_gives_a_key_away():
    """A user's texts in the title, a table and a code block appear unchanged and do not act as markup."""
    output = "runs/a|b `c` ``d``\n---\n<b>\udcff"
    text = card_of({"output_dir": output, "chat_template": "````\n# not a heading\n```", "dataset_mixer": {"x|y": 1.0},
                    "oracle": "judge", "judge_model": "g|1", "judge_url": "https://me:secret1@host/v1?key=secret2"},
                   "train.py --judge_url='https://me:secret1@host/v1?key=secret2' --chat_template='```'")
    assert "secret" not in text and "https://host/v1" in text
    assert "\n# ``` a|b `c` ``d`` --- <b>\\udcff ```\n" in text
    assert "| data | 100 % of `x\\|y` |" in text and "| annotator | judge, `g\\|1` |" in text
    assert "\n````sh\n" in text and "\n`````yaml\n" in text
    assert yaml.safe_load(text.split("`````yaml\n")[1].split("\n`````")[0])["chat_template"].startswith("````")


def test_a_run_without_matplotlib_has_a_card_without_a_picture(train, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    monkeypatch.setattr(curves, "draw", None)
    run = train("plain", max_steps=1)
    assert not (run.output / "curves.png").exists() and "curves" not in (run.output / "README.md").read_text()


def test_a_notebooks_backend_that_is_not_installed_changes_nothing():
    """matplotlib reads MPLBACKEND, which a notebook sets for all commands in it, when it is imported."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(f"""
        import os, sys
        sys.path.insert(0, {str(ROOT)!r})
        os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
        from runtime import curves
        curves.draw({{"run": []}})
        """)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(train, monkeypatch):
    def fails(runs):
        raise ImportError("numpy.core.multiarray failed to import")
    monkeypatch.setattr(curves, "draw", fails)
    run = train("no-picture", max_steps=1)
    assert "no curves: matplotlib fails (ImportError: numpy.core.multiarray failed to import)" in run.stdout
    assert run.summary()["queries"] == 8 and "curves" not in (run.output / "README.md").read_text()


def test_a_runs_own_card_has_its_command_and_its_picture(train):
    run = train("card", max_steps=2)
    text = (run.output / "README.md").read_text()
    assert "](curves.png)" in text and (run.output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert f"train.py --config {run.output.parent}/tiny.yaml --max_steps=2" in text
    assert f"| labels bought | {run.summary()['queries']} " in text
