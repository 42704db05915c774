"""tools/generate.py --pairs, on tiny random models and a server on loopback: `python -m pytest tests/test_pairs.py -n 0`.

Whole rounds, from prompts to a better model, are in test_rounds.py.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import (
    CHATML,
    ROOT,
    ULTRAFEEDBACK,
    completion,
    load_source,
    renderer,
    reply,
    system,
    user,
    wait_until,
    write_folder,
)
from test_generate import greedy, lines, one_line, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from labels.endpoint import Endpoint, Exchange
from runtime import toy
from runtime.errors import UsageError
from runtime.formats import parse_prompt, parse_row
from runtime.rendering import Renderer
from tools import generate, pairs

SHORT = ("--max_new_tokens", "12")
COIN = ("--max_new_tokens", "1", "--top_k", "2")
PROMPTS = [f"review of the {place} in {city} :" for place in toy.PLACES[:4] for city in toy.CITIES[:5]]


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the tiny model's folder."""
    return shutil.copytree(tiny / "model", tmp_path / "model")


@pytest.fixture
def chat_model(model, tmp_path):
    """The same with a chat template."""
    folder = shutil.copytree(model, tmp_path / "chat")
    tokenizer, lm = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(Endpoint, "backoff_seconds", 0.02)


def run(*argv, code=0):
    assert generate.main(["--pairs", *SHORT, *map(str, argv)]) == code


# Models on this machine.

def test_pairs_are_rows_that_training_takes(model, prompts, capsys):
    run(model, "--prompts", prompts)
    found = lines(model / "pairs.jsonl")
    assert [row["prompt"] for row in found] == PROMPTS and [row["number"] for row in found] == list(range(1, 21))
    cut = sum(row[f"finish_{side}"] == "length" for row in found for side in "ab")
    assert cut and (f"20 pairs in {model / 'pairs.jsonl'}; {cut} of 40 responses were cut off at their greatest length\n"
                    in capsys.readouterr().out)
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded, labels, _, said = load_source(model / "pairs.jsonl", made=Renderer(tokenizer, 32, 96))
    assert said == "train: 20 rows read, 20 pairs" and labels == {}
    texts = [row[f"response_{side}"] for row in found for side in "ab"]
    assert all(text == " " + text.strip() for text in texts)  # as plain text: what follows the prompt, with its space
    assert max(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts) == 12


def test_each_side_is_a_draw_of_its_own_from_the_model(model, prompts, tmp_path):
    """The nucleus that top_p leaves is that of a plain forward pass; another seed draws other tokens."""
    for seed in (1, 2):
        run(model, "--prompts", prompts, "--top_p", 0.2, "--seed", seed, "--output", tmp_path / f"{seed}.jsonl")
    found = [row[f"response_{side}"] for seed in (1, 2) for row in lines(tmp_path / f"{seed}.jsonl") for side in "ab"]
    assert len(set(found)) == len(found) == 80
    tokenizer, lm = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    for row in lines(tmp_path / "1.jsonl")[:5]:
        ids = tokenizer(row["prompt"] + row["response_a"], return_tensors="pt").input_ids
        with torch.no_grad():
            likely, order = lm(ids).logits[0].softmax(-1).sort(descending=True)
        start = len(tokenizer(row["prompt"]).input_ids)
        for at in range(start, ids.size(1)):
            rank = (order[at - 1] == ids[0, at]).nonzero().item()
            assert likely[at - 1, :rank].sum() < 0.2 + 1e-4


def test_two_models_write_one_side_each(model, prompts, tmp_path, capsys):
    other = shutil.copytree(model, tmp_path / "other")
    torch.manual_seed(7)
    toy.make_model(AutoTokenizer.from_pretrained(model)).save_pretrained(other)
    run(model, other, "--prompts", prompts, "--temperature", 0)
    assert lines(model / "pairs.jsonl")
    for row in lines(model / "pairs.jsonl"):
        assert row["response_a"].strip() == greedy(model, row["prompt"])
        assert row["response_b"].strip() == greedy(other, row["prompt"])
    os.utime(other / "model.safetensors", ns=(1, 1))
    run(model, other, "--prompts", prompts, "--temperature", 0, code=2)
    assert "another weights" in one_line(capsys)


def test_the_batch_size_changes_nothing(model, prompts, tmp_path):
    for size in (1, 3, 16):
        run(model, "--prompts", prompts, "--batch_size", size, "--output", tmp_path / f"{size}.jsonl")
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "3.jsonl").read_text() == (tmp_path / "16.jsonl").read_text()


HH = "\n\nHuman: the bar\n\nAssistant: the food\n\nHuman: the view\n\nAssistant:"
TALK = [system("the"), user("the bar"), reply("the food"), user("the view")]


@pytest.mark.parametrize("row, as_text, as_chat", [
    ({"prompt": "the view"}, "the view", [user("the view")]),
    ({"prompt": "the view", "chosen": "a", "rejected": "b", "label": "a", "id": 3}, "the view", [user("the view")]),
    (ULTRAFEEDBACK, "Why?", [user("Why?")]),
    ({"prompt": HH}, HH, TALK[1:]),
    ({"prompt": "the view", "system": "the"}, None, [TALK[0], TALK[3]]),
    ({"prompt": [{**message, "id": 3} for message in TALK]}, None, TALK)],
    ids=["text", "other fields", "whole conversations", "hh", "system", "messages"])
def test_prompts_become_messages_where_the_model_chats(model, chat_model, tmp_path, capsys, row, as_text, as_chat):
    prompts = write(tmp_path / "p.jsonl", [row])
    run(chat_model, "--prompts", prompts)
    made, = lines(chat_model / "pairs.jsonl")
    assert made["prompt"] == as_chat and made["response_a"] == made["response_a"].strip()
    assert parse_row(made, "here")["responses"] == [[reply(made["response_a"])], [reply(made["response_b"])]]
    run(model, "--prompts", prompts, code=0 if as_text else 2)
    if as_text:
        assert lines(model / "pairs.jsonl")[0]["prompt"] == as_text
    else:
        assert one_line(capsys).endswith(f"{prompts}, row 1: messages need a chat template and the tokenizer has none: set "
                                         "chat_template")


LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML


def test_tools_come_back_in_their_column_and_training_takes_them(chat_model, tmp_path, capsys):
    asked = [{"prompt": [user("the view")], "tools": [LOOK]},
             {"prompt": "the bar", "tools": json.dumps([LOOK]), "system": "the"}]
    prompts = write(tmp_path / "p.jsonl", asked)
    for flags, out in (((), "pairs.jsonl"), (("--max_new_tokens", 1, "--top_k", 1), "pairs.left_out.jsonl")):
        (chat_model / "pairs.settings.json").unlink(missing_ok=True)
        (chat_model / "pairs.jsonl").unlink(missing_ok=True)
        run(chat_model, "--prompts", prompts, "--chat_template", WITH_TOOLS, *flags)
        found = lines(chat_model / out)
        assert [row["tools"] for row in found] == [[LOOK]] * 2
        assert [row["prompt"] for row in found] == [[user("the view")], [system("the"), user("the bar")]]
        assert [parse_prompt(row, "here") for row in found] == [parse_prompt(row, "here") for row in asked]
        run(chat_model, "--prompts", prompts, "--chat_template", WITH_TOOLS, *flags)
        assert "2 prompts done before" in capsys.readouterr().out
        run(chat_model, "--prompts", write(tmp_path / "other.jsonl", [{**asked[0], "tools": []}, asked[1]]),
            "--chat_template", WITH_TOOLS, *flags, code=2)
        assert "row 1: does not answer prompt 1 of --prompts" in one_line(capsys)
        if not flags:
            said = load_source(write_folder(tmp_path / "set", found), made=renderer(template=WITH_TOOLS))[3]
            assert "2 rows read, 2 pairs" in said


def test_a_chat_model_reads_the_prompt_as_in_training(chat_model, tmp_path):
    """Greedy, with a second model that cannot write the same."""
    other = shutil.copytree(chat_model, tmp_path / "other")
    lm = AutoModelForCausalLM.from_pretrained(other)
    torch.manual_seed(7)
    lm.apply(lm._init_weights)
    for parameter in lm.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    lm.save_pretrained(other)
    run(chat_model, other, "--prompts", write(tmp_path / "p.jsonl", [{"prompt": "the view"}]), "--temperature", 0,
        "--auto_insert_empty_system_msg", "false")
    row, = lines(chat_model / "pairs.jsonl")
    rendered = "<|im_start|>user\nthe view<|im_end|>\n<|im_start|>assistant\n"
    assert row["response_a"] == greedy(chat_model, rendered, ends=("</s>", "<|im_end|>"))


def test_a_response_has_the_beginning_that_the_template_writes(chat_model, tmp_path):
    """Training refuses a response without it."""
    template = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    run(chat_model, "--prompts", write(tmp_path / "p.jsonl", [{"prompt": "the view"}] * 3), "--chat_template", template)
    found = lines(chat_model / "pairs.jsonl")
    assert all(row["response_a"].startswith("<think>\n") and row["response_a"].count("<think>") == 1 for row in found)
    _, _, _, said = load_source(write_folder(tmp_path / "set", found), made=renderer(template=template))
    assert "3 rows read, 3 pairs" in said


def test_a_text_file_has_a_prompt_a_line(model, tmp_path, capsys):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffreview of the bar :\r\n\n  \nthe view\n".encode())
    run(model, "--prompts", path)
    assert [row["prompt"] for row in lines(model / "pairs.jsonl")] == ["review of the bar :", "the view"]
    path.write_bytes(b"the view\nthe \xff\n")
    run(model, "--prompts", path, "--output", tmp_path / "other.jsonl", code=2)
    assert f"{path}, row 2, field prompt: not valid Unicode" in one_line(capsys)


def test_repeated_prompts_are_asked_again(model, tmp_path):
    run(model, "--prompts", write(tmp_path / "p.jsonl", [{"prompt": "the view"}] * 6))
    found = lines(model / "pairs.jsonl")
    assert len({row["response_a"] for row in found}) == 6 == len({row["response_b"] for row in found})


def test_equal_responses_are_drawn_again_and_at_last_left_out(model, tiny, capsys):
    """One token out of two: half of the pairs are equal in each draw."""
    run(model, "--prompts", tiny / "pairs" / "train.jsonl", *COIN)
    out = capsys.readouterr().out
    found, left_out = lines(model / "pairs.jsonl"), lines(model / "pairs.left_out.jsonl")
    assert all(row["response_a"] != row["response_b"] for row in found)
    again = sum(row["draws"] > 1 for row in found)
    assert {row["draws"] for row in found} == {1, 2, 3, 4, 5} and again > 20
    assert {row["reason"] for row in left_out} == {"equal responses, in draw 5 too"}
    assert len(found) + len(left_out) == 120 and len(left_out) > 0
    asked = [row["prompt"] for row in lines(tiny / "pairs" / "train.jsonl")]
    assert all(asked[row["number"] - 1] == row["prompt"] for row in found + left_out)
    assert f"{len(found)} pairs in" in out and f"; {again} drawn again, because a response was empty or broken" in out
    assert f"; {len(left_out)} prompts left out ({len(left_out)} equal responses), in {model}/pairs.left_out.jsonl" in out
    run(model, "--prompts", tiny / "pairs" / "train.jsonl", *COIN)
    assert capsys.readouterr().out.replace(", 120 prompts done before", "") == out.splitlines(True)[-1]


@pytest.mark.parametrize("a, b, reason", [
    (" good", " bad", None), ("", " bad", "empty response"), (" good", " \n", "empty response"), ("", "", "empty response"),
    (" good", "good\n", "equal responses")])
def test_what_makes_a_pair(a, b, reason):
    row = pairs.outcome(generate.EvalQuestion(3, ["p"], {}, "here"), [(a, "stop"), (b, "length")], 1)
    assert row.get("reason") == reason and row["number"] == 3
    if reason is None:
        assert row == {"prompt": "p", "response_a": a, "response_b": b, "finish_a": "stop", "finish_b": "length", "draws": 1,
                       "number": 3}


def test_the_built_in_task_has_prompts():
    found = pairs.read_prompts("toy")
    assert len(found) > 2000 and [prompt for _, prompt in found] == toy.split_prompts(0)[0]


# Stopped and resumed.

KILLED = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
from tools import generate, pairs
add, calls = pairs.PairFile.add, []
def killed(*args):
    calls.append(args)
    add(*args)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
pairs.PairFile.add = killed
generate.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(model, tiny, tmp_path, monkeypatch, capsys):
    flags = [str(model), "--pairs", "--prompts", str(tiny / "pairs" / "train.jsonl"), *COIN, "--batch_size", "15"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *flags], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    written = [row for name in ("pairs.jsonl", "pairs.left_out.jsonl") if (model / name).exists()
               for row in lines(model / name)]
    assert len(written) == 75
    drawn, real = [], pairs.Writers.draw
    monkeypatch.setattr(pairs.Writers, "draw", lambda self, questions, draw: drawn.append(
        [question.key for question in questions]) or real(self, questions, draw))
    assert generate.main(flags) == 0
    assert not {number for batch in drawn for number in batch} & {row["number"] for row in written}
    assert "75 prompts done before" in capsys.readouterr().out
    assert generate.main([*flags, "--output", str(tmp_path / "undisturbed.jsonl")]) == 0
    for end in (".jsonl", ".left_out.jsonl"):
        files = model / f"pairs{end}", tmp_path / f"undisturbed{end}"
        assert files[0].read_text() == files[1].read_text()
    drawn.clear()
    assert generate.main(flags) == 0 and drawn == []


def test_a_line_that_was_cut_short_is_written_again(model, prompts):
    run(model, "--prompts", prompts)
    whole = (model / "pairs.jsonl").read_bytes()
    for left in (whole[:-20], whole[:30]):
        (model / "pairs.jsonl").write_bytes(left)
        run(model, "--prompts", prompts)
        assert (model / "pairs.jsonl").read_bytes() == whole


def test_a_row_that_the_disk_takes_only_in_part_is_an_error_and_is_written_again(tmp_path):
    """The limit on the size of a file stands for a full disk."""
    question = generate.EvalQuestion(1, ["the view"], {}, "here")
    row = pairs.outcome(question, [("a" * 300, "stop"), ("b", "stop")], 1)
    file = pairs.PairFile(tmp_path / "pairs.jsonl", {"seed": 1}, [question])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        with pytest.raises(UsageError, match="pairs.jsonl: cannot be written .the disk took only a part.: make room"):
            file.add([row])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "pairs.jsonl").stat().st_size == 200
    file = pairs.PairFile(tmp_path / "pairs.jsonl", {"seed": 1}, [question])
    assert file.done == {}
    file.add([row])
    assert lines(tmp_path / "pairs.jsonl") == [row]


def test_a_prompt_that_two_commands_answered_at_once_has_one_pair(model, prompts):
    """They would have to be told apart by a lock; what they wrote is not lost."""
    run(model, "--prompts", prompts)
    whole = (model / "pairs.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (model / "pairs.jsonl").write_bytes(b"".join(lines[:2] + lines[:2] + lines[2:]))
    run(model, "--prompts", prompts)
    assert (model / "pairs.jsonl").read_bytes() == whole


def test_pairs_of_other_settings_weights_or_prompts_are_refused(model, prompts, tmp_path, capsys):
    run(model, "--prompts", prompts)
    before = (model / "pairs.jsonl").read_bytes()

    def refused(*flags, prompts=prompts):
        run(model, "--prompts", prompts, *flags, code=2)
        return one_line(capsys)
    path = model / "pairs.jsonl"
    assert refused("--seed", 5).endswith(f"{path} holds answers made with another seed (42; now 5): choose another "
                                         "--output, or delete it")
    assert "another temperature (1.0; now 0.5)" in refused("--temperature", 0.5)
    for flag, words in (("top_p", "1.0; now 0.5"), ("top_k", "0; now 3"), ("max_new_tokens", "12; now 9")):
        assert f"another {flag} ({words})" in refused(f"--{flag}", words.split()[-1])
    assert "row 1: does not answer prompt 1 of --prompts: choose another --output" in refused(
        prompts=write(tmp_path / "other.jsonl", [{"prompt": "the view"}]))
    assert "row 20: does not answer prompt 20 of --prompts" in refused(
        prompts=write(tmp_path / "fewer.jsonl", [{"prompt": prompt} for prompt in PROMPTS[:19]]))
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert "another weights" in refused()
    (model / "pairs.settings.json").unlink()
    assert "was not made by this command" in refused()
    assert path.read_bytes() == before


def test_more_prompts_at_the_end_are_only_added(model, prompts, tmp_path, capsys):
    run(model, "--prompts", prompts)
    before = lines(model / "pairs.jsonl")
    more = write(tmp_path / "more.jsonl", [{"prompt": prompt} for prompt in [*PROMPTS, "the view"]])
    run(model, "--prompts", more)
    assert lines(model / "pairs.jsonl")[:20] == before and "20 prompts done before" in capsys.readouterr().out


# A server.

def written(prompt, n):
    return completion(f" response {n} to {prompt} ", "length" if n else "stop")


def ask(server, prompts, out, *flags, code=0, model=("m",)):
    run("--prompts", prompts, "--endpoint", server.url, "--endpoint_model", *model, "--output", out, *flags, code=code)


def test_a_server_writes_the_pairs(serve, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", "secret")
    server, out = serve(written), tmp_path / "out" / "pairs.jsonl"
    ask(server, prompts, out, "--endpoint_key_env", "MY_KEY", "--temperature", 0.7, "--top_p", 0.9, "--seed", 3)
    found = lines(out)
    assert [row["prompt"] for row in found] == [[user(prompt)] for prompt in PROMPTS]
    for row, prompt in zip(found, PROMPTS):
        assert (row["response_a"], row["response_b"]) == (f"response 0 to {prompt}", f"response 1 to {prompt}")
        assert (row["finish_a"], row["finish_b"], row["draws"]) == ("stop", "length", 1)
    assert len(server.bodies) == 40 and len({body.pop("seed") for body in server.bodies}) == 40
    assert all(dict(body, messages=0) == {"model": "m", "messages": 0, "temperature": 0.7, "top_p": 0.9, "max_tokens": 12}
               for body in server.bodies)
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}
    said = capsys.readouterr().out
    assert "20 prompts to m at http://127.0.0.1" in said and "20 of 40 responses were cut off" in said
    assert "secret" not in said + (out.parent / "pairs.settings.json").read_text()
    loaded, _, _, said = load_source(write_folder(tmp_path / "set", found), made=renderer(template=CHATML))
    assert "20 pairs" in said


def test_a_server_gets_the_tools_and_a_row_keeps_them(serve, tmp_path):
    def behave(prompt, n):
        return (400, {}, {"error": {"message": "content filter"}}) if prompt == "the bar" else written(prompt, n)
    server, out = serve(behave), tmp_path / "out.jsonl"
    asked = [{"prompt": [user(text)], "tools": [LOOK]} for text in ("the view", "the bar")]
    ask(server, write(tmp_path / "p.jsonl", asked), out)
    assert [body["tools"] for body in server.bodies if body["messages"] == [user("the view")]] == [[LOOK]] * 2
    for path, prompt in ((out, "the view"), (out.with_suffix(".left_out.jsonl"), "the bar")):
        row, = lines(path)
        assert (row["prompt"], row["tools"]) == ([user(prompt)], [LOOK])


def test_to_a_server_only_flags_that_are_given_are_sent_and_two_models_write_one_side_each(serve, prompts, tmp_path):
    server = serve(lambda prompt, n: completion(f"{n}"))
    argv = ["--pairs", "--prompts", str(prompts), "--endpoint", server.url, "--output", str(tmp_path / "p.jsonl"),
            "--endpoint_model", "m", "n"]
    assert generate.main(argv) == 0
    assert sorted((body["model"], len(body)) for body in server.bodies) == [("m", 2)] * 20 + [("n", 2)] * 20


def test_pairs_that_a_server_wrote_with_other_settings_are_refused(serve, prompts, tmp_path, capsys):
    """One that is left out now counts too."""
    server, out, flags = serve(written), tmp_path / "pairs.jsonl", {"temperature": 0.7, "top_p": 0.9, "seed": 3}
    ask(server, prompts, out, *(f"--{name}={value}" for name, value in flags.items()))
    for name, value in flags.items():
        for other in (None, 0.5 if name != "seed" else 5):
            changed = {**flags, name: other}
            ask(server, prompts, out, *(f"--{name}={value}" for name, value in changed.items() if value is not None), code=2)
            assert f"another {name} ({value}; now {other})" in one_line(capsys)
    assert len(server.bodies) == 40


def test_a_prompt_that_a_server_is_too_busy_for_does_not_keep_it_from_others(serve, prompts, tmp_path, capsys, monkeypatch):
    """It is given up after some of the others have had their replies, and before the last have."""
    monkeypatch.setattr(Endpoint, "longest_wait", 0.01)

    def behave(prompt, n):
        busy = prompt == PROMPTS[0]
        while len(server.bodies) < 8 if busy else len(server.bodies) > 20 and server.prompts().count(PROMPTS[0]) < 6:
            time.sleep(0.01)
        return (429, {}, "later") if busy else written(prompt, n)
    server = serve(behave)
    ask(server, prompts, tmp_path / "pairs.jsonl", "--concurrency", 2, code=75)
    assert "1 prompts have no pair yet" in one_line(capsys) and len(lines(tmp_path / "pairs.jsonl")) == 19


def test_a_server_is_asked_again_for_empty_or_equal_responses(serve, prompts, tmp_path, capsys):
    hard, hopeless = PROMPTS[2], PROMPTS[5]
    texts = {hard: ["", "x", "x", "x ", "x", "y"]}  # empty, equal, different

    def behave(prompt, n):
        return completion("same" if prompt == hopeless else texts[prompt][n] if prompt in texts else f"{n}")
    out = tmp_path / "pairs.jsonl"
    ask(serve(behave), prompts, out)
    found = {row["prompt"][0]["content"]: row for row in lines(out)}
    assert found[hard]["draws"] == 3 and found[hard]["response_b"] == "y" and hopeless not in found
    assert lines(tmp_path / "pairs.left_out.jsonl") == [
        {"prompt": [user(hopeless)], "reason": "equal responses, in draw 5 too", "number": 6}]
    assert "19 pairs in" in (said := capsys.readouterr().out) and "; 1 drawn again" in said and "1 equal responses" in said


@pytest.mark.parametrize("finish", ["content_filter", "abort", "error"])
def test_a_response_that_a_server_broke_off_is_none(finish, serve, prompts, tmp_path):
    """Or it would be labelled, and trained on, as one that came to its end."""
    def behave(prompt, n):
        return completion(f"{n}", finish if prompt == PROMPTS[0] and n % 2 or prompt == PROMPTS[1] and n == 0 else "stop")
    out = tmp_path / "pairs.jsonl"
    ask(serve(behave), prompts, out)
    assert lines(tmp_path / "pairs.left_out.jsonl") == [
        {"prompt": [user(PROMPTS[0])], "reason": "response broken off by the server, in draw 5 too", "number": 1}]
    first, *others = lines(out)
    assert (first["response_a"], first["response_b"], first["draws"]) == ("2", "3", 2)
    assert len(others) == 18 and all(row["draws"] == 1 for row in others)


def test_a_prompt_that_a_server_refuses_is_left_out_and_never_asked_again(serve, prompts, tmp_path, capsys):
    def behave(prompt, n):
        return (400, {}, {"error": {"message": "content filter"}}) if prompt == PROMPTS[0] else written(prompt, n)
    server, out = serve(behave), tmp_path / "pairs.jsonl"
    ask(server, prompts, out)
    assert lines(tmp_path / "pairs.left_out.jsonl") == [
        {"prompt": [user(PROMPTS[0])], "reason": "refused: HTTP 400 content filter", "number": 1}]
    assert "19 pairs in" in (said := capsys.readouterr().out) and "1 prompts left out (1 refused)" in said
    asked = [body["messages"][0]["content"] for body in server.bodies]
    assert {prompt: asked.count(prompt) for prompt in PROMPTS} == {PROMPTS[0]: 1, **dict.fromkeys(PROMPTS[1:], 2)}
    ask(server, prompts, out)
    assert len(server.bodies) == len(asked)


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_server_that_refuses_everything_is_an_error_in_one_line(serve, prompts, tmp_path, capsys, status):
    server = serve(lambda prompt, n: (status, {}, {"error": {"message": "no model m"}}))
    ask(server, prompts, tmp_path / "pairs.jsonl", code=2)
    assert one_line(capsys) == (f"tools/generate.py: {server.url}/chat/completions: HTTP {status} no model m; check the "
                                "url, the model and the key")
    assert list(tmp_path.glob("pairs*")) == [] and len(server.bodies) <= 20


@pytest.mark.parametrize("reply, requests, reason", [
    ((403, {}, "no"), 2, 'refused: HTTP 403 "no"'), (completion("greedy"), 10, "equal responses, in draw 5 too")])
def test_a_server_that_is_of_no_use_stops_the_run_and_nobody_is_left_out(serve, tmp_path, capsys, reply, requests, reason):
    server = serve(lambda prompt, n: written(prompt, n) if len(server.bodies) <= 20 or "the word yes" in prompt else reply)
    prompts = tmp_path / "p.txt"
    prompts.write_text("".join(f"prompt {n}\n" for n in range(99)))
    ask(server, prompts, tmp_path / "pairs.jsonl", "--concurrency", 1, code=2)
    assert f"20 prompts in a row without a usable pair; the last, {prompts}, row 30: {reason}" in one_line(capsys)
    assert len(lines(tmp_path / "pairs.jsonl")) == 10 and len(server.bodies) == 20 + 20 * requests
    assert not (tmp_path / "pairs.left_out.jsonl").exists()


@pytest.mark.parametrize("answer, words", [
    ((402, {}, "no credit"), "HTTP 402"), (completion("same"), "20 prompts in a row")], ids=["refused", "useless"])
def test_a_run_that_stops_still_hears_what_it_has_sent(serve, tmp_path, monkeypatch, capsys, answer, words):
    """The first prompt is answered only once the others have stopped the run. Its pair is paid for, so it is kept."""
    made = []

    class Seen(Exchange):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    def behave(prompt, n):
        if prompt != "prompt 0":
            return answer
        assert made[0].stop.wait(300)
        return written(prompt, n)

    monkeypatch.setattr(pairs, "Exchange", Seen)
    prompts, out = tmp_path / "p.txt", tmp_path / "pairs.jsonl"
    prompts.write_text("".join(f"prompt {n}\n" for n in range(99)))
    server = serve(behave)
    ask(server, prompts, out, "--concurrency", 3, code=2)
    assert words in one_line(capsys) and [row["number"] for row in lines(out)] == [1]
    assert not (tmp_path / "pairs.left_out.jsonl").exists() and len(server.bodies) < 250  # of 990


def test_a_server_of_newer_models_gets_the_fields_that_it_takes(serve, prompts, tmp_path, capsys):
    def behave(prompt, n):
        if "max_tokens" in server.bodies[-1]:
            return 400, {}, {"error": {"message": "Unsupported parameter: 'max_tokens' is not supported."}}
        return completion(f"{len(server.bodies)}")
    server = serve(behave)
    ask(server, prompts, tmp_path / "pairs.jsonl", "--concurrency", 1)
    assert [set(body) for body in server.bodies[-40:]] == [{"model", "messages", "max_completion_tokens"}] * 40
    assert "m: it takes no max_tokens, so max_completion_tokens is sent instead" in capsys.readouterr().out


def test_a_finish_reason_that_is_no_text_is_none(serve, tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "the view"}])
    ask(serve(lambda prompt, n: completion(f"{n}", {"type": "stop"})), prompts, tmp_path / "pairs.jsonl")
    assert [row["finish_a"] for row in lines(tmp_path / "pairs.jsonl")] == ["stop"]


def test_a_response_is_the_content_as_it_is_and_thinking_alone_is_none(serve, tmp_path):
    def behave(prompt, n):
        status, headers, body = completion(f"use <think> and </think> {n}" if n else None, "length")
        body["choices"][0]["message"]["reasoning_content"] = "so far"
        return status, headers, body
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "the view"}])
    ask(serve(behave), prompts, tmp_path / "pairs.jsonl")
    row, = lines(tmp_path / "pairs.jsonl")
    assert [row["draws"], row["response_a"], row["response_b"]] == [2, *(f"use <think> and </think> {n}" for n in (2, 3))]


def test_a_key_that_is_withdrawn_stops_the_run_and_leaves_nobody_out(serve, prompts, tmp_path, capsys):
    server = serve(lambda prompt, n: written(prompt, n) if len(server.bodies) < 20 else (401, {}, "no"))
    out = tmp_path / "pairs.jsonl"
    ask(server, prompts, out, "--concurrency", 1, code=2)
    assert "HTTP 401" in one_line(capsys) and len(lines(out)) == 9 and not (tmp_path / "pairs.left_out.jsonl").exists()
    server.behave = written
    ask(server, prompts, out)
    assert len(lines(out)) == 20


def test_a_server_that_goes_down_stops_with_75_and_the_same_command_goes_on(serve, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Endpoint, "longest_wait", 0.01)
    server = serve(lambda prompt, n: written(prompt, n) if len(server.bodies) <= 20 else (503, {}, "busy"))
    out = tmp_path / "pairs.jsonl"
    ask(server, prompts, out, "--concurrency", 2, code=75)
    said, before = one_line(capsys), lines(out)
    assert f"{20 - len(before)} prompts have no pair yet; the same command goes on once the server answers again" in said
    assert 'HTTP 503 "busy"' in said and 8 <= len(before) <= 10
    other = serve(written)  # the first may still get a request that was on its way
    ask(other, prompts, out)
    assert len(other.bodies) == 2 * (20 - len(before))
    after = {row["number"]: row for row in lines(out)}
    assert list(after) == list(range(1, 21)) and all(after[row["number"]] == row for row in before)


def test_a_kill_loses_at_most_the_pairs_in_flight(serve, prompts, tmp_path):
    def slowly(prompt, n):
        time.sleep(0.05)
        return written(prompt, n)
    slow = serve(slowly)
    out = tmp_path / "pairs.jsonl"
    argv = [sys.executable, "tools/generate.py", "--pairs", "--prompts", str(prompts), "--endpoint", slow.url,
            "--endpoint_model", "m", "--output", str(out), "--concurrency", "2"]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: out.exists() and out.read_bytes().count(b"\n") >= 5, process)
    process.kill()
    process.communicate()
    before = lines(out)
    assert 5 <= len(before) < 20
    assert generate.main(argv[2:]) == 0
    after = {row["number"]: row for row in lines(out)}
    assert list(after) == list(range(1, 21)) and all(after[row["number"]] == row for row in before)
    assert 40 <= len(slow.bodies) <= 40 + 2 * 2


# Refusals.

@pytest.mark.parametrize("argv, words", [
    (["M", "--pairs"], "--pairs needs --prompts FILE and one model or two"),
    (["M", "N", "O", "--pairs", "--prompts", "p"], "--pairs needs --prompts FILE and one model or two"),
    (["M", "--pairs", "N", "--prompts", "p", "--questions", "q"], "--questions does not go with --pairs"),
    (["M", "--pairs", "--prompts", "p", "--format", "mt_bench"], "--format does not go with --pairs"),
    (["M", "--pairs", "--prompts", "p", "--concurrency", "3"], "--concurrency does not go with --pairs without --endpoint"),
    (["M", "--pairs", "--prompts", "p", "--temperature", "0"], "--temperature 0 gives both responses the same text"),
    (["M", "M", "--pairs", "--prompts", "p", "--temperature", "0"], "--temperature 0 gives both responses the same text"),
    (["M", "--pairs", "--prompts", "p", "--endpoint", "http://a", "--output", "o"],
     "MODEL does not go with --pairs and --endpoint"),
    (["--pairs", "--prompts", "p", "--endpoint", "http://a", "--endpoint_model", "m", "--bf16"],
     "--bf16 does not go with --pairs and --endpoint"),
    (["--pairs", "--prompts", "p", "--endpoint", "http://a", "--output", "o"], "or --endpoint_model NAME [NAME2]"),
    (["--pairs", "--prompts", "p", "--endpoint", "http://a", "--endpoint_model", "m"], "--endpoint needs --output FILE"),
    (["--pairs", "--prompts", "p", "--endpoint", "http://a", "--endpoint_model", "m", "--output", "o", "--concurrency", "0"],
     "--concurrency 0: expected 1 or more"),
    (["M", "--questions", "q", "--prompts", "p"], "--prompts belongs to --pairs"),
    (["M", "N", "--questions", "q"], "say DIR and --questions FILE, or DIR --pairs --prompts FILE, or --compare A B")])
def test_flags_that_do_not_go_together_are_refused(capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        generate.main(argv)
    assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("row, words", [
    ({"prompt": 3}, "row 2, field prompt: expected a string or a list of messages, found int"),
    ({"text": "a"}, "row 2: needs a prompt; it has text"),
    ({"prompt": "a", "context": "b"}, "row 2, field context: would be left out"),
    ({"prompt": " \n"}, "row 2, field prompt: is empty; remove the row"),
    ({"prompt": TALK[:3]}, "row 2, field prompt: ends with the assistant's message; leave that one to the model"),
    (["a"], "row 2: expected an object with fields, found list")], ids=str)
def test_bad_prompts_are_refused_with_their_row_and_field(model, tmp_path, capsys, row, words):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "the view"}, row])
    run(model, "--prompts", prompts, code=2)
    assert one_line(capsys).startswith(f"tools/generate.py: {prompts}, {words}")
    assert not (model / "pairs.jsonl").exists()


def test_what_cannot_be_read_or_written_is_said_in_one_line(model, chat_model, prompts, tmp_path, capsys):
    for argv, words in [
            ((model, "--prompts", tmp_path / "none.jsonl"), "none.jsonl: there is no such file"),
            ((model, "--prompts", tmp_path / "none.txt"), "none.txt: there is no such file"),
            ((model, "--prompts", write(tmp_path / "empty.txt", [])), "empty.txt: has no prompts"),
            ((tmp_path / "nowhere", "--prompts", prompts), "not a local folder; for a model on the hub, say"),
            ((model, "--prompts", prompts, "--output", "pairs.txt"), "--output pairs.txt: this command writes a file"),
            (("--prompts", prompts, "--endpoint", "http://a/v1", "--endpoint_model", "m", "--output", "pairs.csv"),
             "--output pairs.csv: this command writes a file that ends in .jsonl"),  # or it could not go on with it
            ((model, "--prompts", prompts, "--output", "/proc/x/y.jsonl"), "/proc/x"),
            ((chat_model, model, "--prompts", prompts), "has a chat template, the other model has none"),
            (("--prompts", prompts, "--endpoint", "host/v1", "--endpoint_model", "m", "--output", "o.jsonl"), "'host/v1'")]:
        run(*argv, code=2)
        assert words in one_line(capsys)
