"""tools/generate.py and tools/compare.py, on a tiny random model: `python -m pytest tests/test_generate.py -n 0`.

benchmarks/harnesses.py shows that AlpacaEval and FastChat read the files; it needs those packages.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import CHATML, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import harnesses
from runtime import checkpoint, toy
from runtime.config import Config
from tools import compare, generate

SHORT = ("--max_new_tokens", "12")
TEMPLATE = ("{% for m in messages %}{% if m.role == 'user' %}the {{ m.content }} {% else %}was {{ m.content }}<end>"
            "{% endif %}{% endfor %}{% if add_generation_prompt %}was {% endif %}")
ALPACA = [{"instruction": f"review of the {place} in {city} :", "dataset": "helpful_base", "output": "not this"}
          for place in ("hotel", "bar in the park in the garden") for city in ("paris", "rome")]
PLACES = [("writing", "hotel in rome"), ("math", "bar"), ("stem", "zoo in the park"), ("of one's own", "spa"),
          ("coding", "pub in oslo")]
MT_BENCH = [{"question_id": n, "category": category, "turns": [f"review of the {place} :", "the view in the morning was"]}
            for n, (category, place) in enumerate(PLACES, 81)]


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the tiny model's folder."""
    return shutil.copytree(tiny / "model", tmp_path / "model")


@pytest.fixture
def chat_model(model):
    """The same with a chat template whose turns end in <end>, which is not its EOS."""
    tokenizer, lm = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = TEMPLATE
    lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    lm.save_pretrained(model)
    tokenizer.save_pretrained(model)
    return model


def write(path, rows, lines=True):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows), encoding="utf-8")
    return path


def run(model, questions, *flags, code=0):
    assert generate.main([str(model), "--questions", str(questions), *SHORT, *map(str, flags)]) == code


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def turns(path):
    return [row["choices"][0]["turns"] for row in lines(path)]


# The files that are written.

@pytest.mark.parametrize("as_lines", [True, False])
def test_alpaca_eval(model, tmp_path, capsys, as_lines):
    rows = [*ALPACA, {"instruction": "the music"}, ALPACA[0]]  # one without a data set, one twice
    run(model, write(tmp_path / "q.json", rows, as_lines), "--format", "alpaca_eval", "--name", "mine")
    found = json.loads((model / "model_outputs.json").read_text())
    assert [list(row) for row in found] == [["instruction", "output", "generator"] if "dataset" not in row else
                                            ["dataset", "instruction", "output", "generator"] for row in rows]
    for field in ("dataset", "instruction"):
        assert [row.get(field) for row in found] == [row.get(field) for row in rows]
    assert {row["generator"] for row in found} == {"mine"} and found[0]["output"] == found[-1]["output"]
    assert all(row["output"] and row["output"] == row["output"].strip() for row in found)
    assert "as plain text, because the model has no chat template\n6 answers in" in capsys.readouterr().out
    run(model, tmp_path / "q.json", "--format", "alpaca_eval", "--name", "mine")
    assert "6 answers in" in (said := capsys.readouterr().out) and "6 of them from before" in said


def test_mt_bench(model, tmp_path):
    began = time.time()
    run(model, write(tmp_path / "question.jsonl", MT_BENCH), "--format", "mt_bench")
    found = lines(model / "data/mt_bench/model_answer/model.jsonl")
    assert [row["question_id"] for row in found] == [81, 82, 83, 84, 85]
    assert len({row["answer_id"] for row in found}) == 5
    for row in found:
        assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        assert row["model_id"] == "model" and began <= row["tstamp"] <= time.time()
        (choice,) = row["choices"]
        assert list(choice) == ["index", "turns"] and choice["index"] == 0
        assert len(choice["turns"]) == 2 and all(type(turn) is str for turn in choice["turns"])


def test_jsonl_is_the_default_and_takes_the_rows_of_a_test_split(tiny, model):
    run(model, tiny / "pairs" / "test.jsonl")
    found, asked = lines(model / "responses.jsonl"), lines(tiny / "pairs" / "test.jsonl")
    assert [row["prompt"] for row in found] == [row["prompt"] for row in asked]
    assert all(list(row) == ["prompt", "response"] for row in found)


def test_jsonl_asks_what_training_would_see(chat_model, tmp_path, capsys):
    """The system message and the tools of a row are asked, and tell its answer from others."""
    look, hear = ({"type": "function", "function": {"name": name}} for name in ("view", "music"))
    talk = [{"role": "user", "content": "the bar"}]
    asked = [{"prompt": "the bar"}, {"prompt": "the bar", "system": "the"}, {"question": "the bar"},
             *({"prompt": talk, "tools": tools} for tools in ([look], json.dumps([hear])))]
    questions = write(tmp_path / "q.jsonl", asked)
    flags = ("--chat_template", "{% for tool in tools or () %}{{ tool.function.name }} {% endfor %}" + CHATML)
    run(chat_model, questions, *flags)
    found = lines(chat_model / "responses.jsonl")
    ours = [{"prompt": "the bar"}, {"prompt": [{"role": "system", "content": "the"}, *talk]}, {"prompt": talk},
            {"prompt": talk, "tools": [look]}, {"prompt": talk, "tools": [hear]}]
    assert [{name: row[name] for name in row if name != "response"} for row in found] == ours
    chat = "<|im_start|>user\nthe bar<|im_end|>\n<|im_start|>assistant\n"
    for row, text in zip(found, ("the bar", f"<|im_start|>system\nthe<|im_end|>\n{chat}", chat, f"view {chat}",
                                 f"music {chat}")):
        assert row["response"] == greedy(chat_model, text, ends=("</s>", "<end>"))
    kept = (chat_model / "responses.jsonl").read_text()
    (chat_model / "responses.jsonl").write_text(kept[:kept.rindex("{\"prompt")])
    run(chat_model, questions, *flags)
    assert "5 answers in" in (said := capsys.readouterr().out) and "4 of them from before" in said
    assert (chat_model / "responses.jsonl").read_text() == kept
    assert generate.main(["--compare", str(chat_model), str(chat_model)]) == 0
    assert "5 questions in both, 5 answers the same" in capsys.readouterr().out


def test_the_task_of_the_harnesses_is_the_committed_one():
    rows = lines(harnesses.TASK / "reviews.jsonl")
    assert rows == harnesses.reviews() and len(rows) == 100
    for row in rows:
        gold = [toy.gold_reward(choice) for choice in row["choices"]]
        assert gold[row["better"]] > gold[1 - row["better"]]


# The answers.

def greedy(model, text, new=12, ends=("</s>",)):
    """The answer to one text, token by token, without padding, cache or generate()."""
    tokenizer, lm = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    ids, answer = tokenizer(text).input_ids, []
    with torch.no_grad():
        while len(answer) < new:
            answer.append(lm(torch.tensor([ids + answer])).logits[0, -1].argmax().item())
            if answer[-1] in tokenizer.convert_tokens_to_ids(list(ends)):
                break
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_greedy_answers_are_those_of_a_plain_loop_and_the_second_turn_sees_the_first(model, tmp_path):
    run(model, write(tmp_path / "question.jsonl", MT_BENCH), "--format", "mt_bench", "--temperature", 0)
    for row, (first, second) in zip(MT_BENCH, turns(model / "data/mt_bench/model_answer/model.jsonl"), strict=True):
        assert first == greedy(model, row["turns"][0])
        assert second == greedy(model, "\n\n".join([row["turns"][0], first, row["turns"][1]]))
        assert second != greedy(model, row["turns"][1])


def test_cudnns_attention_is_off_as_in_training(model, tmp_path):
    """On an H100 it would plan for each new token anew. In a process of its own, because a run in this one turns it off."""
    questions = write(tmp_path / "questions.jsonl", [{"prompt": "review of the bar :"}])
    code = (f"import torch; from tools import generate; generate.main([{str(model)!r}, '--questions', {str(questions)!r}, "
            "'--max_new_tokens', '2']); print('cuDNN', torch.backends.cuda.cudnn_sdp_enabled())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("cuDNN False\n")


@pytest.mark.parametrize("flags", [[], ["--temperature", "1", "--top_p", "0.9"]], ids=["by category", "sampled"])
def test_the_batch_size_changes_nothing(model, tmp_path, flags):
    questions = write(tmp_path / "question.jsonl", [*MT_BENCH, {**MT_BENCH[0], "question_id": 9, "turns": ["the view was"]}])
    for size in (1, 2, 16):
        run(model, questions, "--format", "mt_bench", "--batch_size", size, "--output", tmp_path / f"{size}.jsonl", *flags)
    assert turns(tmp_path / "1.jsonl") == turns(tmp_path / "2.jsonl") == turns(tmp_path / "16.jsonl")
    assert list(map(len, turns(tmp_path / "16.jsonl"))) == [2, 2, 2, 2, 2, 1]


def test_temperature_follows_the_category_and_the_seed(model, tmp_path):
    questions = write(tmp_path / "question.jsonl", MT_BENCH)
    found = {}
    for name, flags in {"1": (), "again": (), "2": ("--seed", 2), "cold": ("--temperature", 0)}.items():
        seed = () if "--seed" in flags else ("--seed", 1)
        run(model, questions, "--format", "mt_bench", "--output", tmp_path / f"{name}.jsonl", *seed, *flags)
        found[name] = turns(tmp_path / f"{name}.jsonl")
    assert found["1"] == found["again"]
    changed = [row["category"] for row, a, b in zip(MT_BENCH, found["1"], found["2"]) if a != b]
    assert changed == ["writing", "stem", "of one's own"]  # math and coding are greedy
    assert [found["1"][n] for n in (1, 4)] == [found["cold"][n] for n in (1, 4)] and found["1"][0] != found["cold"][0]


def test_temperatures_are_those_of_fastchat():
    assert generate.TEMPERATURES == {
        "writing": 0.7, "roleplay": 0.7, "extraction": 0, "math": 0, "coding": 0, "reasoning": 0, "stem": 0.1,
        "humanities": 0.1, "arena-hard-200": 0}
    asked = [generate.MtBench.question(row, "here").temperature for row in MT_BENCH]
    assert asked == [0.7, 0, 0.1, 0.7, 0]


@pytest.mark.parametrize("cut, kept", [({}, 5), ({"top_k": 2}, 2), ({"top_p": 0.6}, 2)])
def test_draws_follow_the_softmax_of_each_row(cut, kept):
    count, scores = 4000, torch.tensor([1.0, 3.0, 0.0, 2.5, -2.0])
    temperatures = torch.tensor([2.0, 0.0]).repeat_interleave(count)
    even = ((torch.arange(count) + 0.5) / count).repeat(2)[:, None]  # as uniform as numbers can be
    left = generate.Draw(temperatures, even, **cut)(None, scores.repeat(2 * count, 1))
    assert ((left == 0).sum(1) == 1).all() and left.isinf().sum() == 2 * count * 4
    drawn = left.argmax(1)
    likely = (scores / 2).softmax(0)
    likely[likely.argsort(descending=True)[kept:]] = 0
    shares = drawn[:count].bincount(minlength=5) / count
    assert torch.allclose(shares, likely / likely.sum(), atol=2 / count)
    assert (drawn[count:] == 1).all()


def test_uniform_numbers_belong_to_seed_question_and_turn():
    all_different = [(0, ("a", 1), 0), (1, ("a", 1), 0), (0, ("a", 2), 0), (0, ("a", 1), 1)]
    first, *others = [generate.uniforms(*which, 50) for which in all_different]
    assert torch.equal(first, generate.uniforms(*all_different[0], 50))
    assert not any(torch.isclose(first, other).any() for other in others)


def test_a_chat_template_is_used_and_its_end_of_turn_ends_an_answer(chat_model, tmp_path, capsys):
    lm = AutoModelForCausalLM.from_pretrained(chat_model)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    prompts = generate.Prompts(tokenizer, 100, True)
    assert tokenizer.convert_ids_to_tokens(prompts.ends(lm)) == ["</s>", "<end>"]
    question = generate.MtBench.question(MT_BENCH[1], "here")
    ids = prompts(question, ["food <end> food"])  # the text of a special token does not become one
    words = "<s> the review of the bar : was food <unk> <unk> <unk> food <end> the the view in the morning was was".split()
    assert [word if word in tokenizer.vocab else "<unk>" for word in words] == tokenizer.convert_ids_to_tokens(ids)
    run(chat_model, write(tmp_path / "question.jsonl", MT_BENCH), "--format", "mt_bench", "--temperature", 0)
    first, second = turns(chat_model / "data/mt_bench/model_answer/model.jsonl")[1]
    ends = ("</s>", "<end>")
    assert first == greedy(chat_model, "the review of the bar : was", ends=ends)
    assert second == greedy(chat_model, f"the review of the bar : was {first} <end> the the view in the morning was was",
                            ends=ends)
    assert "through the model's chat template" in capsys.readouterr().out


def test_the_empty_system_message_is_as_the_training_run_had_it(chat_model, tmp_path, capsys):
    """As a run writes its config.yaml; a flag overrides it."""
    questions = write(tmp_path / "q.json", ALPACA[:1], lines=False)
    for trained, flags, empty in ((True, (), True), (False, (), False), (True, ("false",), False)):
        (chat_model / "config.yaml").unlink(missing_ok=True)  # a run with another value would be refused
        checkpoint.write_config(Config(model_name_or_path="base", auto_insert_empty_system_msg=trained), chat_model, 8)
        flags = [word for flag in flags for word in ("--auto_insert_empty_system_msg", flag)]
        out = tmp_path / f"{trained} {empty}.json"
        run(chat_model, questions, "--format", "alpaca_eval", "--chat_template", CHATML, "--output", out, *flags)
        assert ("with an empty system message as in training" in capsys.readouterr().out) == empty
        text = ("<|im_start|>system\n<|im_end|>\n" * empty
                + f"<|im_start|>user\n{ALPACA[0]['instruction']}<|im_end|>\n<|im_start|>assistant\n")
        assert json.loads(out.read_text())[0]["output"] == greedy(chat_model, text, ends=("</s>", "<end>"))


def test_the_flags_of_training_reach_the_model(tmp_path):
    given = dict(bf16="true", seed="7", chat_template="{{ messages }}", auto_insert_empty_system_msg=None,
                 model_revision="v2", trust_remote_code="true")
    config = generate.model_config("org/model", SimpleNamespace(**given), torch.device("cpu"))
    assert (config.model_name_or_path, config.model_revision, config.seed) == ("org/model", "v2", 7)
    assert config.bf16 and config.trust_remote_code and config.chat_template == "{{ messages }}"
    none = SimpleNamespace(**dict.fromkeys(given))
    for name, empty in (("org/model", False), ("alignment-handbook/zephyr-7b-sft-full", True)):
        config = generate.model_config(name, none, torch.device("cpu"))
        assert config.auto_insert_empty_system_msg == empty and not config.bf16 and not config.trust_remote_code


def test_an_answer_ends_at_its_first_end_token(model):
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(text).input_ids for text in ("the view in rome", "review of the bar :")]

    def ask(ends):
        return generate.respond(lm, tokenizer, prompts, generate.Draw(torch.zeros(2), torch.rand(2, 12)), ends)
    whole = [(text.split(), ended) for text, ended in ask([3])]
    end = whole[1][0][4]
    found = ask([3, tokenizer.convert_tokens_to_ids(end)])
    for (words, _), (text, ended) in zip(whole, found):
        assert text.split() == words[:words.index(end)] if end in words else words
        assert ended == (end in words)
    assert found[1][1]


def test_long_prompts_keep_their_bos_and_their_end(model, tmp_path, capsys):
    words = " ".join(["the view was lovely"] * 40)  # the model has 128 positions
    run(model, write(tmp_path / "q.jsonl", [{"prompt": words}, {"prompt": "the view"}]))
    assert "1 prompts were cut to their last 116 tokens" in capsys.readouterr().out
    prompts = generate.Prompts(AutoTokenizer.from_pretrained(model), 7, True)
    ids = prompts(generate.Jsonl.question({"prompt": words}, "here"), [])
    assert prompts.tokenizer.decode(ids) == "<s> was lovely the view was lovely"


# Stopped and resumed.

KILLED = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
from tools import generate
replace, calls = os.replace, []
def killed(*args):
    calls.append(args)
    if len(calls) == 5:  # the settings, then one file per batch
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*args)
os.replace = killed
generate.main(sys.argv[1:])
"""


def test_a_killed_run_leaves_a_whole_file_and_goes_on(model, tmp_path):
    """Killed when the fourth answer is written but not in its place yet."""
    questions = write(tmp_path / "question.jsonl", [{**MT_BENCH[n % 5], "question_id": n} for n in range(20)])
    flags = ["--questions", str(questions), "--format", "mt_bench", "--max_new_tokens", "40"]
    path = model / "data/mt_bench/model_answer/model.jsonl"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(model), *flags, "--batch_size", "1"], cwd=ROOT,
                            capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = lines(path)
    assert len(before) == 3
    assert generate.main([str(model), *flags]) == 0
    after = lines(path)
    assert [row["question_id"] for row in after] == list(range(20))
    assert [row for row in after if row["question_id"] in {row["question_id"] for row in before}] == before
    assert generate.main([str(model), *flags, "--output", str(tmp_path / "unkilled.jsonl")]) == 0
    assert turns(path) == turns(tmp_path / "unkilled.jsonl")


def test_ctrl_c_stops_with_75_and_nothing_is_asked_twice(model, tmp_path, capsys, monkeypatch):
    questions = write(tmp_path / "q.json", ALPACA, lines=False)
    real, calls = generate.respond, []

    def respond(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args)
    monkeypatch.setattr(generate, "respond", respond)
    run(model, questions, "--format", "alpaca_eval", "--batch_size", 1, code=75)
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(generate, "respond", lambda *args: calls.append(args) or real(*args))
    run(model, questions, "--format", "alpaca_eval", "--batch_size", 1)
    assert len(calls) == 4 and "4 answers in" in (out := capsys.readouterr().out) and "2 of them from before" in out
    run(model, questions, "--format", "alpaca_eval")
    assert len(calls) == 4


def test_answers_of_other_settings_weights_or_questions_are_refused(model, tmp_path, capsys):
    questions = write(tmp_path / "q.json", ALPACA, lines=False)
    command = [questions, "--format", "alpaca_eval"]
    run(model, *command)
    capsys.readouterr()

    def refused(*flags, questions=questions):
        run(model, questions, *command[1:], *flags, code=2)
        return capsys.readouterr().err
    path = model / "model_outputs.json"
    before = path.read_bytes()
    assert refused("--seed", 5) == (f"tools/generate.py: {path} holds answers made with another seed (42; now 5): choose "
                                    "another --output, or delete it\n")
    assert "another temperature (None; now 0.5)" in refused("--temperature", 0.5)
    for flag, words in (("top_p", "1.0; now 0.5"), ("top_k", "0; now 3"), ("max_new_tokens", "12; now 9"),
                        ("name", "model; now other")):
        assert f"another {flag} ({words})" in refused(f"--{flag}", words.split()[-1])
    assert "row 3: answers a question that is not asked" in refused(
        questions=write(tmp_path / "fewer.json", ALPACA[:2], lines=False))
    weights = model / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert "another weights" in refused()
    (model / "model_outputs.settings.json").unlink()
    assert "was not made by this command" in refused()
    assert path.read_bytes() == before


# Refusals.

@pytest.mark.parametrize("format, row, words", [
    ("alpaca_eval", {"instruction": 3}, "row 2, field instruction: expected a text, found 3"),
    ("alpaca_eval", {"instruction": " "}, "row 2, field instruction: expected a text"),
    ("alpaca_eval", {"instruction": "a", "input": "b"}, "row 2, field input: AlpacaEval asks with the instruction alone"),
    ("alpaca_eval", ["a"], "row 2: expected an object with fields, found list"),
    ("alpaca_eval", {"instruction": "\ud800"}, "row 2, field instruction: not valid Unicode"),
    ("mt_bench", {"turns": ["a"]}, "row 2, field question_id: expected a number or a text, found None"),
    ("mt_bench", {"question_id": 82, "turns": ["a"]}, "row 2, field category: expected a text"),
    ("mt_bench", {**MT_BENCH[0], "turns": []}, "row 2, field turns: expected a list of texts"),
    ("mt_bench", {**MT_BENCH[1], "turns": ["a", None]}, "row 2, field turns: expected a text, found None"),
    ("mt_bench", MT_BENCH[0], "row 2, field question_id: 81 appears twice"),
    ("jsonl", {"text": "a"}, "row 2: needs a prompt; it has text"),
    ("jsonl", {"prompt": "a", "context": "b"}, "row 2, field context: would be left out"),
    ("jsonl", {"prompt": [{"role": "user", "content": "a"}]}, "row 2: messages need a chat template"),
], ids=str)
def test_bad_questions_are_refused_with_their_row_and_field(model, tmp_path, capsys, format, row, words):
    first = {"alpaca_eval": ALPACA[0], "mt_bench": MT_BENCH[0], "jsonl": {"prompt": "the"}}[format]
    questions = write(tmp_path / "q.jsonl", [first, row])
    out = tmp_path / ("out.json" if format == "alpaca_eval" else "out.jsonl")
    run(model, questions, "--format", format, "--output", out, code=2)
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith(f"tools/generate.py: {questions}, {words}")
    assert not out.exists()


def one_line(capsys):
    """The error, which is the only line besides progress bars."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tools/generate.py: ")]
    return line


def test_models_that_cannot_answer_are_refused(model, tmp_path, capsys):
    questions = write(tmp_path / "q.jsonl", [{"prompt": "the view"}])
    run(tmp_path / "nowhere", questions, code=2)
    assert "not a local folder; for a model on the hub, say --output FILE too" in one_line(capsys)
    run(model, tmp_path / "none.jsonl", code=2)
    assert one_line(capsys).endswith("none.jsonl: there is no such file")
    run(model, questions, "--max_new_tokens", 128, code=2)
    assert "--max_new_tokens 128: the model has 128 positions" in one_line(capsys)
    run(model, questions, "--output", "answers.txt", code=2)
    assert "--output answers.txt: this command writes a file that ends in .jsonl" in one_line(capsys)
    run(model, questions, "--bf16", "perhaps", code=2)
    assert "command line, --bf16: expected true or false" in one_line(capsys)
    run(model, questions, "--output", "/proc/x/y.jsonl", code=2)
    assert "/proc/x" in one_line(capsys)
    (model / "model.safetensors").unlink()
    run(model, questions, code=2)
    assert "cannot be loaded" in one_line(capsys) and not (model / "responses.jsonl").exists()
    for flags in (["--temperature", "-1"], ["--top_p", "0"], ["--batch_size", "0"], ["--name", "a/b"], ["--format", "csv"]):
        with pytest.raises(SystemExit) as stop:
            run(model, questions, *flags)
        assert stop.value.code == 2


def test_home_is_not_a_folder_of_that_name_and_an_empty_path_is_none(model, tmp_path, capsys, monkeypatch):
    """A shell leaves the ~ of --output=~/answers.jsonl as it is."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    run(model, write(tmp_path / "q.jsonl", [{"prompt": "the view"}]), "--output=~/deep/answers.jsonl")
    assert lines(tmp_path / "home" / "deep" / "answers.jsonl") and not (tmp_path / "~").exists()
    with pytest.raises(SystemExit):
        run(model, tmp_path / "q.jsonl", "--output", "")
    assert "--output: is empty; name a file or folder" in capsys.readouterr().err
    assert not (model / "responses.jsonl").exists()


# Side by side.

HOSTILE = ("first\r\n    indented\n\ttab \x1b[2J\x1b]0;title\x07 \x9b31m \u202eright to left 日本語の文章" + "長" * 50
           + "x" * 99)


def sides(tmp_path, *answers):
    paths = []
    for name, rows in zip("ab", answers):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "responses.jsonl", [{"prompt": p, "response": r} for p, r in rows])
        paths.append(str(tmp_path / name))
    return paths


@pytest.mark.parametrize("width", [40, 80, 160])
def test_side_by_side_keeps_the_width_and_no_text_controls_the_terminal(tmp_path, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    a, b = sides(tmp_path, [(HOSTILE, f"{HOSTILE} \ud800"), ("same", "yes"), ("only a", "z")],
                 [("same", "yes"), (HOSTILE, "word " * 60)])
    assert generate.main(["--compare", a, b]) == 0
    out = capsys.readouterr().out
    assert all(c == "\n" or c.isprintable() for c in out) and "\\x1b[2J\\x1b]0;title\\x07" in out.replace("\n", "")
    shown = out.splitlines()
    assert max(map(compare.columns, shown)) <= width
    assert shown[1].startswith("══ 1 of 2 ══") and compare.columns(shown[1]) == width
    assert " ".join(shown).endswith("  2 questions in both, 1 answers the same; 1 only in a")
    rows = [line.split(" │ ") for line in shown if " │" in line]
    assert {line.index("│") for line in shown if "│" in line and line.isascii()} <= {(width - 3) // 2 + 1}
    assert "".join(row[1].replace(" ", "") for row in rows if len(row) > 1).count("word") == 60
    assert any(line.startswith("    indented") for line in shown) and any("(the same)" in line for line in shown)


def test_wrap():
    assert compare.wrap("one two  three", 7) == ["one two", "three"]
    assert compare.wrap("  ab cd\n\nabcdefgh i", 4) == ["  ab", "cd", "", "abcd", "efgh", "i"]
    assert compare.wrap("日本語e\u0301", 4) == ["日本", "語e\u0301"]
    assert compare.wrap("", 4) == [""]


def test_every_format_is_compared_and_folders_are_looked_into(model, tmp_path, capsys):
    asked = {"alpaca_eval": write(tmp_path / "q.json", ALPACA, lines=False),
             "mt_bench": write(tmp_path / "question.jsonl", MT_BENCH)}
    for format, questions in asked.items():
        for name, seed in (("a", 1), ("b", 2)):
            folder = shutil.copytree(model, tmp_path / format / name)
            run(folder, questions, "--format", format, "--temperature", 1, "--seed", seed)
        capsys.readouterr()
        flags = ["--questions", str(questions)] if format == "mt_bench" else []
        assert generate.main(["--compare", str(tmp_path / format / "a"), str(tmp_path / format / "b"), *flags]) == 0
        out = capsys.readouterr().out
        prompt = ALPACA[0]["instruction"] if format == "alpaca_eval" else MT_BENCH[0]["turns"][1]
        assert f"\n{prompt}\n\na " in out and f"\n{4 if format == 'alpaca_eval' else 5} questions in both" in out
    assert "══ 1 of 5, turn 2 ══" in out
    assert generate.main(["--compare", str(tmp_path / "mt_bench" / "a"), str(tmp_path)]) == 2
    assert "holds no responses.jsonl or model_outputs.json" in one_line(capsys)


def test_answers_to_a_question_that_was_asked_twice_are_all_compared(tmp_path, capsys):
    a, b = sides(tmp_path, [("q", "one"), ("q", "two")], [("q", "one"), ("q", "other")])
    assert generate.main(["--compare", a, b]) == 0
    out = capsys.readouterr().out
    assert "2 questions in both, 1 answers the same" in out and "two" in out and "other" in out


def test_a_turn_that_one_model_did_not_answer_is_shown(tmp_path, capsys):
    for name, turns in (("a.jsonl", ["one", "two"]), ("b.jsonl", ["one"])):
        write(tmp_path / name, [{"question_id": 1, "model_id": name, "choices": [{"index": 0, "turns": turns}]}])
    assert generate.main(["--compare", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "turn 2" in out and "(no answer to this turn)" in out and "two" in out


def test_files_without_a_common_question_are_not_compared(tmp_path, capsys):
    a, b = sides(tmp_path, [("q", "one")], [("r", "one")])
    assert generate.main(["--compare", a, b]) == 2 and "have no question in common" in one_line(capsys)


def test_which_answers_are_compared_is_plain(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    a, b = sides(tmp_path, [("q", "one")], [("q", "two")])
    assert generate.main(["--compare", a, f"{a}/responses.jsonl"]) == 0
    assert f"\n{a}/responses.jsonl " in capsys.readouterr().out  # by their paths, as both are called a
    write(tmp_path / "b" / "model_outputs.json", [{"instruction": "q"}], lines=False)
    assert generate.main(["--compare", a, b]) == 2
    assert "b: holds 2 answer files (responses.jsonl, model_outputs.json): name one" in one_line(capsys)
    write(tmp_path / "none.jsonl", [{"prompt": "q", "response": None}])
    assert generate.main(["--compare", a, f"{tmp_path}/none.jsonl"]) == 2
    assert "none.jsonl, row 1: is not an answer written by" in one_line(capsys)


def test_compare_is_a_command_of_its_own(tmp_path):
    a, b = sides(tmp_path, [("prompt", "one")], [("prompt", "two")])
    done = subprocess.run([sys.executable, ROOT / "tools/compare.py", a, b], cwd="/", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "1 question in both, 0 answers the same" in done.stdout
    done = subprocess.run([sys.executable, ROOT / "tools/compare.py", a, "nowhere"], cwd="/", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "tools/compare.py: nowhere: there is no such file\n"


@pytest.mark.parametrize("row", [{"question_id": 1}, {"question_id": 1, "turns": "one"}, {"question_id": 1, "turns": [1]},
                                 {"question_id": 1, "turns": []}, {"question_id": [1], "turns": ["one"]}])
def test_compare_refuses_a_file_that_holds_no_questions(tmp_path, row, capsys):
    answer = {"question_id": 1, "model_id": "m", "choices": [{"turns": ["yes"]}]}
    answers = [str(write(tmp_path / f"{name}.jsonl", [answer])) for name in "ab"]
    questions = write(tmp_path / "question.jsonl", [{"question_id": 0, "turns": ["zero"]}, row])
    assert compare.main(*answers, str(questions)) == 2
    assert "question.jsonl, row 2: needs question_id and turns, a list of texts" in one_line(capsys)


def test_a_pipe_that_is_closed_early_is_not_an_error(tmp_path):
    a, b = sides(tmp_path, [(f"prompt {n}", "word " * 99) for n in range(999)], [(f"prompt {n}", "x") for n in range(999)])
    done = subprocess.run(f"{sys.executable} tools/generate.py --compare {a} {b} | head -n 2; exit ${{PIPESTATUS[0]}}",
                          shell=True, executable="/bin/bash", cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("\n══ 1 of 999 ═")
