"""runtime/sources.py through data.load_pairs: files, folders, the hub, mixing, decontamination, the cache.

    python -m pytest tests/test_sources.py
"""

import csv
import gzip
import json
import os
from collections import Counter
from types import SimpleNamespace

import datasets
import pytest
from helpers import (
    CHATML,
    LLAMA,
    ULTRAFEEDBACK,
    ZEPHYR,
    as_jsonl,
    decoded,
    load_source,
    preference,
    renderer,
    reply,
    tokenizer,
    user,
    write_folder,
)

import data
from runtime import rendering, sources
from runtime.config import Config
from runtime.errors import DataError
from runtime.formats import parse_row
from runtime.rendering import Renderer

GOOD = json.dumps(preference(0))
pytestmark = pytest.mark.usefixtures("cache")


# ----------------------------------------------------------------------------------------------------------------------
# Sources

ROWS = [preference(n) for n in range(6)]
EXPECTED = [(f"question {n}", {f" good {n}</s>", f" bad {n}</s>"}) for n in range(6)]


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_source(path, form, rows):
    """Write rows in one of the forms that a source may have; returns the source."""
    path.mkdir()
    if form == "jsonl":
        (path / "train.jsonl").write_text(as_jsonl(rows).replace("\n", "\n\n"))  # blank lines do not count as rows
    elif form == "jsonl with byte order mark":
        (path / "train.jsonl").write_text(as_jsonl(rows), encoding="utf-8-sig")
    elif form == "jsonl.gz":
        (path / "train.jsonl.gz").write_bytes(gzip.compress(as_jsonl(rows).encode()))
    elif form == "json":
        (path / "train.json").write_text(json.dumps(rows, indent=1))
    elif form == "json.gz":
        (path / "train.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    elif form == "csv":
        write_csv(path / "train.csv", rows)
    elif form == "csv with byte order mark":  # what spreadsheets write
        write_csv(path / "x.csv", rows)
        (path / "train.csv").write_text((path / "x.csv").read_text(), encoding="utf-8-sig")
    elif form == "csv.gz":
        write_csv(path / "x.csv", rows)
        (path / "train.csv.gz").write_bytes(gzip.compress((path / "x.csv").read_bytes()))
    elif form == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path / "train.parquet")
    elif form == "Dataset":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif form == "DatasetDict":
        datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(path)
    elif form == "one file":
        (path / "my.csv.jsonl").write_text(as_jsonl(rows))
        return path / "my.csv.jsonl"
    return path


FORMS = ("jsonl", "jsonl with byte order mark", "jsonl.gz", "json", "json.gz", "csv", "csv with byte order mark",
         "csv.gz", "parquet", "Dataset", "DatasetDict", "one file")


@pytest.mark.parametrize("form", FORMS)
def test_sources(tmp_path, cache, form):
    source = write_source(tmp_path / "s", form, ROWS)
    pairs, labels, truths, said = load_source(source)
    assert [(p, {a, b}) for p, a, b in decoded(pairs)] == EXPECTED
    assert len(labels) == 6 and said == "train: 6 rows read, 6 pairs"
    assert load_source(source, kind="test") == (None, {}, {}, "")
    assert list(cache.rglob("*.arrow"))  # the cache is where the fixture says


@pytest.mark.parametrize("form", ("jsonl", "json", "parquet", "Dataset", "DatasetDict"))
def test_sources_with_messages(tmp_path, form):
    source = write_source(tmp_path / "s", form, [ULTRAFEEDBACK, {**ULTRAFEEDBACK, "prompt_id": "2"}])
    made = renderer(template=CHATML, eos="<|im_end|>", empty_system=False)
    pairs, labels, _, said = load_source(source, made=made)
    [(prompt, *responses)] = set(decoded(pairs, made))
    assert prompt == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert set(responses) == {"Since.<|im_end|>", "No.<|im_end|>"}
    assert len(pairs) == 2 and len(labels) == 1 and said == "train: 2 rows read, 2 pairs, 1 of them repeated"


def test_splits(tmp_path):
    """Splits of any name, several of them, and one that only some sources have."""
    path = tmp_path / "s"
    write_folder(path, ROWS[:2], "train_prefs")
    write_folder(path, ROWS[2:4], "train_gen")
    write_folder(path, ROWS[4:], "test_prefs")
    assert len(load_source(path, splits=["train_prefs", "train_gen"])[0]) == 4
    assert [p for p, *_ in decoded(load_source(path, kind="test", splits=["test_prefs"])[0])] == ["question 4", "question 5"]
    with pytest.raises(DataError, match=rf"{path}: has no split train "):
        load_source(path)
    saved, alone = tmp_path / "saved", write_folder(tmp_path / "alone", ROWS[:2])
    datasets.DatasetDict(test=datasets.Dataset.from_list(ROWS[:1])).save_to_disk(saved)
    with pytest.raises(DataError, match=rf"{saved}: has no split train "):
        load_source({alone: 1.0, str(saved): 1.0})
    # a fraction is of training pairs; all evaluation pairs are taken, from the sources that have some
    mixer = {str(path): 0.5, str(saved): 0.5, alone: 1.0}
    assert len(load_source(mixer, kind="test", splits=["test_prefs", "test"])[0]) == 3


def test_hub_source(monkeypatch):
    """A hub id goes through datasets, with its config name; the error names id, split and row."""
    asked, commit = [], "1"

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [ROWS[0], {"chosen": "x"}] if split == "bad" else ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train", "bad"])
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config: SimpleNamespace(hash=commit))
    pairs, labels, _, _ = load_source("someone/prefs", configs={"someone/prefs": "small"})
    assert [(p, {a, b}) for p, a, b in decoded(pairs)] == EXPECTED and len(labels) == 6
    assert asked == [("someone/prefs", "small", "train")]
    load_source("someone/prefs", configs={"someone/prefs": "small"})
    assert len(asked) == 1  # in the cache
    commit = "2"
    load_source("someone/prefs", configs={"someone/prefs": "small"})
    assert len(asked) == 2  # the owner has changed it
    load_source("someone/prefs", configs={"someone/prefs": "large"})
    assert asked[2:] == [("someone/prefs", "large", "train")]
    with pytest.raises(DataError, match=r"someone/prefs \[bad\], row 2, field rejected: .*nothing"):
        load_source("someone/prefs", splits=["bad"])
    assert load_source("someone/prefs", kind="test") == (None, {}, {}, "")
    with pytest.raises(DataError, match="someone/prefs: has no split train_prefs"):
        load_source("someone/prefs", splits=["train_prefs"])


@pytest.fixture
def load_split(monkeypatch):
    """load_split(kind, **keys): the pairs of a run with these keys, as its only process loads them."""
    monkeypatch.setattr(data, "all_gather", lambda value: [value])
    monkeypatch.setattr(data, "rank_0_first", lambda work: work())

    def load(kind, **keys):
        config = Config(model_name_or_path="m", output_dir="o", **{"dataset_splits": ["train", "test"], **keys})
        return data.load_split(config, tokenizer(), kind, None)[0]
    return load


def test_dataset_configs_are_in_the_order_of_the_sources(monkeypatch, load_split):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: asked.append((name, config)) or ROWS)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train"])
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config: SimpleNamespace(hash="1"))
    load_split("train", dataset_mixer={"b/one": 1.0, "a/two": 1.0}, dataset_configs=["x", "y"])
    assert asked == [("b/one", "x"), ("a/two", "y")]


@pytest.mark.parametrize("form", ("one file", "Dataset"))
def test_a_source_without_splits_counts_once(form, tmp_path):
    """However many training splits the other sources have."""
    source = tmp_path / ("rows.jsonl" if form == "one file" else "saved")
    if form == "one file":
        source.write_text(json.dumps(preference(1)) + "\n")
    else:
        datasets.Dataset.from_list([preference(1)]).save_to_disk(source)
    assert len(load_source(source, splits=["train_sft", "train_gen"])[0]) == 1


def test_tools_are_the_same_from_every_kind_of_file(tmp_path):
    """Arrow gives each object the fields of all the others."""
    tools = [{"name": "weather", "parameters": {"city": {"type": "string"}}},
             {"name": "pay", "parameters": {"amount": {"type": "number"}}}]
    row = {"prompt": [user("q")], "chosen": [reply("a")], "rejected": [reply("b")], "tools": tools}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "train.parquet")
    parsed = [parse_row(row, place) for name in ("train.jsonl", "train.parquet")
              for place, row in sources.read_file(tmp_path / name)]
    assert parsed[0] == parsed[1] and json.loads(parsed[0]["prompt"][0]["content"]) == tools


def test_mixer_and_max_samples(tmp_path):
    a = write_folder(tmp_path / "a", [preference(f"a{n}") for n in range(40)])
    b = write_folder(tmp_path / "b", [preference(f"b{n}") for n in range(30)])

    def prompts(seed=1, fractions=(0.5, 0.1), **options):
        pairs, labels, _, said = load_source(dict(zip((a, b), fractions)), seed=seed, **options)
        assert set(pairs.ids) == set(labels)  # no labels of pairs that are not taken
        assert said == f"train: {len(pairs)} rows read, {len(pairs)} pairs"
        return [p for p, *_ in decoded(pairs)]

    taken = prompts()
    assert Counter(p[9] for p in taken) == {"a": 20, "b": 3} and len(set(taken)) == 23
    assert prompts() == taken and sorted(prompts(seed=2)) != sorted(taken)
    assert [int(p[10:]) for p in taken if p[9] == "a"] != list(range(20))  # a random share, not the first rows
    few = prompts(max_samples=10)
    assert len(few) == 10 and set(few) < set(taken) and few == prompts(max_samples=10)
    assert {p[9] for p in prompts(fractions=(1, 1), max_samples=60)} == {"a", "b"}
    assert len(prompts(max_samples=1000)) == 23


# ----------------------------------------------------------------------------------------------------------------------
# Errors

def write_file(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


LONG = "".join(json.dumps(preference(n)) + "\n" for n in range(400))  # longer than the reader's buffer
PACKED = gzip.compress(os.urandom(9000).hex().encode())


@pytest.mark.parametrize("name, content, match", [
    ("f.jsonl", GOOD + "\n\n{\"prompt\": \n", r"f\.jsonl, row 3: not a JSON object"),
    ("f.jsonl", GOOD + "\nhello\n", r"f\.jsonl, row 2: not a JSON object"),
    ("f.json", f"[{GOOD}, {{]", r"f\.json: not valid JSON"),
    ("f.json", f"[{GOOD}, 3]", r"f\.json, row 2: expected an object with fields, found int"),
    ("f.jsonl", LONG.encode() + GOOD.encode().replace(b"question", b"qu\xe9stion"),
     r"f\.jsonl, row 401\b.*(UTF-8|Unicode)"),
    ("f.csv", b"prompt,chosen,rejected\np,c,r\np,\xe9,r\n", r"f\.csv, row 2\b.*(UTF-8|Unicode)"),
    ("f.csv", "prompt,chosen,rejected\np,c\n", r"f\.csv, row 1, field rejected: .*nothing"),
    ("f.jsonl.gz", gzip.compress(LONG.encode())[:-20], r"f\.jsonl\.gz: damaged gzip file"),
    ("f.jsonl.gz", LONG, r"f\.jsonl\.gz: damaged gzip file"),
    ("f.jsonl.gz", PACKED[:2000] + b"\xff" * 300 + PACKED[2300:], r"f\.jsonl\.gz: damaged gzip file"),
    ("f.txt", GOOD, r"f\.txt: a file must end in one of \.jsonl"),
])
def test_malformed_files(tmp_path, name, content, match):
    path = write_file(tmp_path / name, content)
    with pytest.raises(DataError, match=match):
        load_source(path)


def test_malformed_rows_of_other_stores(tmp_path):
    rows = datasets.Dataset.from_list([ROWS[0], {**ROWS[1], "chosen": None}])
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "train.parquet")
    for name, place in (("saved", r"saved \[train\]"), ("parquet", r"train\.parquet")):
        with pytest.raises(DataError, match=rf"{place}, row 2, field chosen: .*nothing"):
            load_source(tmp_path / name)


@pytest.mark.parametrize("form", [{"type": "numpy", "columns": ["chosen", "rejected"]}, {"type": "pandas"}], ids=str)
def test_the_format_that_a_data_set_was_saved_with_hides_nothing(form, tmp_path):
    """datasets saves what set_format said, so that the rows that it reads back may lack their prompts."""
    rows = [preference(n) for n in range(3)]
    datasets.Dataset.from_list(rows).with_format(**form).save_to_disk(tmp_path / "saved")
    assert [row for _, row in sources.read_rows(str(tmp_path / "saved"), "train")] == rows


def test_long_csv_fields(tmp_path):
    """The csv module's limit of 131,072 characters a field does not apply to data, and a field keeps its line ends."""
    write_csv(tmp_path / "f.csv", [preference(0, chosen=" x" * 70_000 + "\r\ny")])
    [parsed] = [parse_row(row, place) for place, row in sources.read_file(tmp_path / "f.csv")]
    assert parsed["responses"][0] == " x" * 70_000 + "\r\ny"


@pytest.mark.parametrize("error", (datasets.exceptions.DatasetNotFoundError, ConnectionError, ValueError))
def test_source_that_is_not_there(monkeypatch, error):
    """The source is neither a path nor a data set on the hub, or the hub cannot be reached: the message names it."""
    def absent(name, *_, **__):
        raise error("not on the hub")

    monkeypatch.setattr(datasets, "get_dataset_split_names", absent)
    with pytest.raises(DataError, match="no/such/train.jsonl"):
        load_source("no/such/train.jsonl")


# ----------------------------------------------------------------------------------------------------------------------
# Decontamination

DOCSTRING = "Return the largest prime factor of n, which is\n    greater than one. Only for small n."
SOLUTION = "    largest = 1\n    for j in range(2, n + 1):\n        largest = max(largest, j)\n    return largest\n"


def human_eval(docstring=DOCSTRING, solution=SOLUTION, quotes='"""'):
    return {"task_id": "HumanEval/0", "entry_point": "f", "canonical_solution": solution,
            "prompt": f"def f(n: int):\n    {quotes} {docstring}\n    >>> f(12)\n    3\n    {quotes}\n",
            "test": "def check(candidate):\n    assert candidate(12) == 3 and candidate(7) == 7\n"}


CONTAMINATED = [
    preference(1, prompt=f"Write this: {DOCSTRING.upper()}"),
    preference(2, chosen="return the largest   prime factor\nof n, which is greater than one. only for small n."),
    preference(3, rejected="def g(n):\n\tlargest = 1\n\tfor j in range(2, n + 1):\n\t\tlargest = max(largest, j)\n"
                           "\treturn largest"),
    {"chosen": [user(DOCSTRING), reply("x")], "rejected": [user(DOCSTRING), reply("y")]}]
CLEAN = [
    preference(4), preference(5, chosen="Return the largest prime factor of m, which is greater than one."),
    preference(6, chosen="def check(candidate): assert candidate(12) == 3 and candidate(7) == 7"),  # its tests
    preference(7, chosen="return n + 1"), preference(8, chosen="    return x")]


@pytest.mark.parametrize("form", ("test.jsonl", "train.jsonl", "one.jsonl", "DatasetDict", "'''", "text file"))
def test_decontamination(tmp_path, form):
    short = human_eval("Short.", "    return n + 1\n")  # too short to say where a text comes from
    path = tmp_path / "bench"
    if form == "text file":
        path = tmp_path / "bench.txt"
        path.write_text(" ".join(DOCSTRING.split()) + "\n\n" + " ".join(SOLUTION.lower().split()) + "\nreturn n + 1\n")
    elif form == "DatasetDict":
        datasets.DatasetDict(test=datasets.Dataset.from_list([human_eval(), short])).save_to_disk(path)
    elif form == "one.jsonl":
        path = write_file(tmp_path / "one.jsonl", as_jsonl([human_eval(), short]))
    else:
        rows = [human_eval(quotes="'''" if form == "'''" else '"""'), short]
        write_folder(path, rows, "train" if form == "train.jsonl" else "test")
    source = write_folder(tmp_path / "s", CONTAMINATED + CLEAN)
    pairs, labels, _, said = load_source(source, decontaminate_with=str(path), made=renderer(template=ZEPHYR))
    assert [int(p.split()[-1]) for p, *_ in decoded(pairs)] == [4, 5, 6, 7, 8] and len(labels) == 5
    assert pairs.counts["rows"] == 9 and pairs.counts["contaminated"] == 4
    assert said == f"train: 9 rows read, 4 dropped as contaminated, 5 pairs, 5 {rendering.UNTEMPLATED}"


def test_decontamination_by_other_data(tmp_path):
    """Every text column of any other data set counts; one without a string of some length is refused."""
    long = "a question that is asked in the exam of the year"
    bench = write_folder(tmp_path / "bench", [{"question": long, "answer": "question 1", "n": 3}], "test")
    source = write_folder(tmp_path / "s", [preference(1), preference(2, rejected=long)])
    assert [p for p, *_ in decoded(load_source(source, decontaminate_with=bench)[0])] == ["question 1"]
    assert len(load_source(source)[0]) == 2  # filtered rows have a cache of their own, one for each benchmark
    other = write_folder(tmp_path / "other", [{"question": long.replace("exam", "test")}], "test")
    assert len(load_source(source, decontaminate_with=other)[0]) == 2
    short = write_folder(tmp_path / "short", [{"question": "x" * 29}], "test")
    with pytest.raises(DataError, match=rf"decontaminate_with {short}: holds no string of 30"):
        load_source(source, decontaminate_with=short)
    with pytest.raises(DataError, match="empty"):
        load_source(source, decontaminate_with=write_folder(tmp_path / "empty", [{"question": "x"}], "validation"))


def test_only_training_pairs_are_decontaminated(tmp_path, load_split):
    (tmp_path / "bench.txt").write_text("a question that is asked in the exam of the year")
    rows = [preference(1), preference(2, chosen="A question that is asked in the exam of the year")]
    for split in ("train", "test"):
        source = write_folder(tmp_path / "s", rows, split)
    keys = dict(dataset_mixer={source: 1.0}, decontaminate_with=str(tmp_path / "bench.txt"))
    assert [len(load_split(kind, **keys)) for kind in ("train", "test")] == [1, 2]


# ----------------------------------------------------------------------------------------------------------------------
# Processes and the cache

def test_processes(tmp_path, cache, monkeypatch):
    """Two processes make the same table as one; an error in one of them still names its row."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    bench = tmp_path / "bench.txt"
    bench.write_text("this string of the benchmark must not be there\n")
    rows = [preference(n) for n in range(2100)]
    rows[1500]["chosen"] = "This string of the benchmark must not be there."
    rows[1600]["chosen"] = ""
    source = write_folder(tmp_path / "s", rows)
    one = load_source(source, workers=1, decontaminate_with=str(bench))
    assert not list(cache.rglob("*_of_*"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    two = load_source(source, workers=2, decontaminate_with=str(bench))
    assert list((tmp_path / "other").rglob("*_of_00002*"))
    assert one[0].table[:] == two[0].table[:] and one[0].ids == two[0].ids and one[1:] == two[1:]
    assert one[0].fingerprint == two[0].fingerprint and len(two[0]) == 2098
    assert two[3] == "train: 2,100 rows read, 1 dropped as contaminated, 1 dropped for an empty response, 2,098 pairs"

    rows[2000] = {"prompt": [{"role": "tool", "content": "x"}], "chosen": "c", "rejected": "r"}
    with pytest.raises(DataError, match=r"train\.jsonl, row 2001: the chat template failed \(.*Only user and"):
        load_source(write_folder(tmp_path / "s", rows), workers=2, made=renderer(template=LLAMA))


def test_cache(tmp_path, monkeypatch):
    """A second load reads the cache; anything that changes what a row becomes makes a new one."""
    rows = [{"prompt": [user(f"q{n}")], "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(20)]
    source = write_folder(tmp_path / "s", rows)
    rendered, parsed = [], []
    render, parse = Renderer.texts, parse_row
    monkeypatch.setattr(Renderer, "texts", lambda self, *args: rendered.append(1) or render(self, *args))
    monkeypatch.setattr(data, "parse_row", lambda *args: parsed.append(1) or parse(*args))

    def again(make=dict(template=CHATML), **options):
        rendered.clear(), parsed.clear()
        out = load_source(options.pop("source", source), made=renderer(**make), **options)
        return out, len(rendered), len(parsed)

    first, *work = again()
    assert work == [20, 20]
    second, *work = again()
    assert work == [0, 0] and second[0].table[:] == first[0].table[:] and second[1:] == first[1:]
    assert second[0].fingerprint == first[0].fingerprint
    fingerprints = {first[0].fingerprint}
    for change in (dict(template="{{ 'x' }}" + CHATML), dict(template=CHATML, max_length=300),
                   dict(template=CHATML, max_prompt_length=100), dict(template=CHATML, empty_system=False),
                   dict(template=CHATML, add_bos=True), dict(template=CHATML, eos="<|im_end|>"),
                   dict(template=CHATML, bos="<|im_start|>")):
        out, *work = again(change)
        assert work == [20, 0], change
        fingerprints.add(out[0].fingerprint)
    assert len(fingerprints) == 8
    assert again(dict(template=CHATML))[1:] == (0, 0)
    out, *work = again(max_samples=5)
    assert work == [5, 0] and len(out[0]) == 5 and out[0].fingerprint not in fingerprints
    assert again(max_samples=5)[1:] == (0, 0) and again(max_samples=5, seed=7)[1:] == (5, 0)
    assert again({"template": CHATML}, source={source: 0.5})[1:] == (10, 0)

    rows[3]["chosen"] = "fine 3"  # of the same size
    out, *work = again(source=write_folder(tmp_path / "s", rows))
    assert work == [20, 20] and any("fine 3" in text for pair in decoded(out[0]) for text in pair)
    assert out[0].fingerprint not in fingerprints
    monkeypatch.setattr(data, "CODE", "other")
    assert again()[1:] == (20, 20)


def test_code_that_is_changed_has_another_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    hashes = set()
    for text in ("a = 1", "a = 2"):
        (tmp_path / "adpo.py").write_text(text)
        hashes.add(sources.hash_of_code("adpo.py"))
    assert len(hashes) == 2


def test_pairs_and_examples_of_one_file_have_caches_of_their_own(tmp_path):
    """UltraFeedback's rows are both."""
    source, made = write_folder(tmp_path / "s", [ULTRAFEEDBACK]), renderer(template=CHATML)
    pairs, examples = (load_source(source, made=made, examples=examples)[0] for examples in (False, True))
    assert pairs.table["second_ids"][0] and examples.table["second_ids"][:] == [[]]


def test_the_splits_of_a_saved_data_set_have_caches_of_their_own(tmp_path):
    splits = {split: datasets.Dataset.from_list([preference(n)]) for n, split in enumerate(("train", "test"))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert [decoded(load_source(tmp_path / "saved", kind)[0])[0][0] for kind in splits] == ["question 0", "question 1"]


@pytest.mark.parametrize("form", ("parquet", "DatasetDict", "Dataset"))
def test_cache_of_a_changed_source(tmp_path, form):
    for n in range(2):
        path = tmp_path / "s"
        if path.exists():
            for file in sorted(path.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            path.rmdir()
        rows = [preference(10 + n)]
        assert decoded(load_source(write_source(path, form, rows))[0])[0][0] == f"question {10 + n}"


def test_a_split_in_two_files_is_refused(tmp_path):
    for name in ("train.jsonl", "train.jsonl.gz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"holds both train.jsonl and train.jsonl.gz; keep one"):
        sources.has_split(tmp_path, "train")
