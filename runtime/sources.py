"""Where rows come from: files, folders and the hub; mixing them; keeping benchmark text out.

    source                   → read_rows      (place, row) of one split; place is "FILE, row N", for error messages
    one split, parsed        → parse_source   a datasets.Dataset, cached on disk
    {source: fraction}       → mix            the rows of all sources, in one Dataset
    rows and a benchmark     → decontaminate  the rows without that benchmark's text

A source is a hub id, a `save_to_disk` folder, a folder with one file per split, or a single file. What the fields of a
row mean is the business of runtime/formats.py: data.py hands parse_source the generator that turns rows into the one form.

Departures from the official code: rows keep their place, so that every error names a file and a row. A file with more
than one reading (a repeated key, an unclosed quote, a cell too many) is refused.
"""

import contextlib
import csv
import gzip
import hashlib
import json
import os
import re
import zlib
from pathlib import Path

import datasets
import pyarrow

from runtime.config import ROOT
from runtime.errors import DataError, one_line
from runtime.formats import message_text, unique_keys

# Shorter strings are too common to show where a text came from ("return x + y").
DECONTAMINATION_MIN_CHARS = 30

csv.field_size_limit(2**31 - 1)  # the library's default is 128 KB, and a response may be longer


# ----------------------------------------------------------------------------------------------------------------------
# Rows from files, folders and the hub

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")


@contextlib.contextmanager
def reading(what):
    """Turn whatever a library raises while reading a file into a DataError that names the file."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{what}: damaged gzip file ({error})")
    except json.JSONDecodeError as error:
        raise DataError(f"{what}: not valid JSON ({error.msg} at character {error.pos})")
    except (OSError, ValueError, LookupError, TypeError, RecursionError, pyarrow.ArrowException,
            datasets.exceptions.DatasetsError) as error:
        error = error.__cause__ or error  # datasets wraps the real reason
        raise DataError(f"{what}: cannot be read ({type(error).__name__}: {one_line(error, 200)})")


def find_file(source, split):
    """The file that holds `split` of a local source (a folder or one file), or None if the folder has no such split.

    A single file counts as the train split. Also returns None for a `save_to_disk` folder, which read_rows handles.
    """
    path = Path(source)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{source}: a file must end in one of {', '.join(SUFFIXES)}")
        return path if "train" in split else None
    found = [file for suffix in SUFFIXES if os.path.lexists(file := path / (split + suffix))]
    if len(found) > 1:
        raise DataError(f"{source}: holds both {found[0].name} and {found[1].name}; keep one")
    if found and not found[0].is_file():
        raise DataError(f"{found[0]}: is not a file but a folder or a broken link: rename or repair it")
    return found[0] if found else None


def has_split(source, split, config_name=None):
    """Whether the source has this split. For a hub id this asks the hub; for a local source it looks at the disk."""
    path = Path(source)
    if os.path.islink(source) and not os.path.exists(source):
        raise DataError(f"{source}: is a broken link: repair it, or name another source")
    if not os.path.exists(source):
        try:
            return split in datasets.get_dataset_split_names(source, config_name)
        except (OSError, ValueError) as error:
            raise DataError(f"{source}: neither a file or folder here nor a data set on the hub ({one_line(error, 400)})")
    if (path / "dataset_dict.json").is_file():
        with reading(path / "dataset_dict.json"):
            return split in json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    if (path / "state.json").is_file():  # a single saved Dataset counts as the train split, like a single file
        return "train" in split
    return find_file(source, split) is not None


def read_rows(source, split, config_name=None):
    """Yield (place, row) for each row of a split; place is "FILE, row N", with N counted from 1."""
    path = Path(source)
    if not path.exists():
        for n, row in enumerate(datasets.load_dataset(source, config_name, split=split), 1):
            yield f"{source} [{split}], row {n}", row
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        with reading(f"{source} [{split}]"):
            loaded = datasets.load_from_disk(str(path)).with_format(None)  # one that was saved may hide columns
            loaded = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
            for n, row in enumerate(loaded, 1):
                yield f"{source} [{split}], row {n}", row
    else:
        yield from read_file(find_file(source, split))


def read_file(path):
    """Yield (place, row) from one jsonl, json or csv file (plain or gzipped), or from one parquet file."""
    with reading(path):
        if path.name.endswith(".parquet"):
            rows = enumerate(datasets.Dataset.from_parquet(str(path)), 1)
        else:
            rows = read_text(path)
        for n, row in rows:
            yield f"{path}, row {n}", row


def read_text(path):
    """Yield (number, row) from a text file.

    Bytes that are not UTF-8 become surrogates here, so that formats.checked_text can name the field they are in.
    """
    opened = gzip.open if path.name.endswith(".gz") else open
    is_csv = path.name.endswith((".csv", ".csv.gz"))
    with opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="" if is_csv else None) as file:
        start = file.read(2)
        file.seek(0)
        if "\0" in start or any("\udc80" <= c <= "\udcff" for c in start):
            raise DataError(f"{path}: not UTF-8 text (it begins like UTF-16 or a binary file): save it as UTF-8")
        if is_csv:
            yield from read_csv(path, file)
        elif start[:1] == "[":  # one JSON array rather than one object per line
            yield from enumerate(json.load(file, object_pairs_hook=unique_keys), 1)
        else:
            for n, line in enumerate(file, 1):
                if line.strip():
                    yield n, read_line(path, n, line)


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)  # built once: json.loads would build one per line


def read_line(path, n, line):
    """The JSON value on line n of a file."""
    try:
        return DECODER.decode(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, row {n}: not a JSON object ({error.msg} at character {error.pos})")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 brackets, a repeated key
        raise DataError(f"{path}, row {n}: not a JSON object ({one_line(error, 80)})")


def read_csv(path, file):
    """Yield (number, row) from an open CSV file.

    Strict, because a lenient reader damages text without saying so: an unclosed quote swallows the rows that follow, and
    an unquoted comma moves the rest of a text into the next column.
    """
    reader = csv.reader(file, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}: two columns have the same name ({one_line(', '.join(header), 80)})")
        for n, cells in enumerate(filter(None, reader), 1):  # blank lines do not count as rows
            if len(cells) > len(header):
                raise DataError(f"{path}, row {n}: {len(cells)} cells, but the header has {len(header)}; put text that "
                                "contains commas in quotes")
            if len(cells) < len(header):
                raise DataError(f"{path}, row {n}, field {header[len(cells)]}: found nothing, the row ends before it")
            yield n, dict(zip(header, cells))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV ({error})")


# ----------------------------------------------------------------------------------------------------------------------
# Parsed rows, cached and mixed

def parse_source(source, split, config_name, parse, version):
    """All rows of one split in the one form, as a datasets.Dataset cached on disk.

    parse: a generator function (source, split, config_name) that yields dicts with the columns id, prompt, first, second
    (the last three JSON), place, and label and truth: +1 if the first response is better, −1 if the second, 0 if unknown.
    version: a list that identifies `parse` in the cache's key. The rest of the key is the source and the state of its
    files, or its commit on the hub.
    Raises DataError, as `parse` does.
    """
    where = os.path.abspath(source)
    if not Path(source).exists():  # on the hub: the commit that a name stands for
        where, state = source, [datasets.load_dataset_builder(source, config_name).hash]
    elif path := find_file(source, split):
        state = [path.stat().st_size, path.stat().st_mtime_ns]
    else:
        state = sorted((str(p), p.stat().st_mtime_ns) for p in Path(source).rglob("*.arrow"))
    columns = {name: datasets.Value("string") for name in ("id", "prompt", "first", "second", "place")}
    columns |= {name: datasets.Value("int8") for name in ("label", "truth")}
    try:
        return datasets.Dataset.from_generator(
            parse, gen_kwargs={"source": source, "split": split, "config_name": config_name},
            features=datasets.Features(columns), fingerprint=hash_of(*version, where, split, config_name, state))
    except datasets.exceptions.DatasetGenerationError as error:  # datasets wraps the real reason
        raise error.__cause__ or error


def mix(mixer, splits, kind, parse, version, configs, max_samples, seed):
    """(the rows of all sources in one datasets.Dataset, these and all that were left out at random), or (None, None) if no
    source has any of the splits.

    parse, version: as parse_source has them; the other arguments as data.load_pairs has them.
    Raises DataError if kind is "train" and a source has none of the splits.
    """
    parts, whole = [], []
    for source, fraction in mixer.items():
        config_name = (configs or {}).get(source)
        here = [split for split in splits if has_split(source, split, config_name)]
        if Path(source).is_file() or (Path(source) / "state.json").is_file():
            here = here[:1]  # it has no splits, and stands for each name: its pairs would count twice
        if kind == "train" and not here:
            raise DataError(f"{source}: has no split {' or '.join(splits)} (a folder holds SPLIT{{{','.join(SUFFIXES)}}})")
        for split in here:
            part = parse_source(source, split, config_name, parse, version)
            whole.append(part)
            if kind == "train" and fraction < 1:
                part = part.shuffle(seed=seed).select(range(round(fraction * len(part))))
            parts.append(part)
    if not parts:
        return None, None
    rows = datasets.concatenate_datasets(parts)
    if max_samples is not None and max_samples < len(rows):
        rows = rows.shuffle(seed=seed).select(range(max_samples))
    return rows, datasets.concatenate_datasets(whole)


def hash_of(*parts):
    """Hash of anything that JSON can hold, as 32 hex digits."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def hash_of_code(*names):
    """Hash of these files of the repository, for the keys of caches: what other code has computed must not be read back.
    Take it when a module is imported, because a file may change while a run is on.  names: paths from the root."""
    return hash_of(*((ROOT / name).read_text(encoding="utf-8") for name in names))


def processes(workers, rows):
    """How many processes `map` should start, or None to stay in this one. With few rows, starting more is not worth it."""
    workers = min(workers or os.cpu_count(), os.cpu_count(), rows // 1000)
    return workers if workers > 1 else None


# ----------------------------------------------------------------------------------------------------------------------
# Decontamination

def decontaminate(rows, source, workers):
    """Drop the pairs whose text contains a string of the benchmark `source`.

    rows: in the form of parse_source.  source: a text file with one string per line, or a data set. Of openai_humaneval
    we take the docstrings and solutions, of any other data set every text column. Case and white space are ignored, and
    so are strings shorter than DECONTAMINATION_MIN_CHARS characters.
    """
    if Path(source).is_file() and not source.endswith(SUFFIXES):
        with reading(source):
            strings = Path(source).read_text(encoding="utf-8").splitlines()
    else:
        split = next((s for s in ("test", "train") if has_split(source, s)), None)
        if split is None:
            raise DataError(f"decontaminate_with {source}: has neither a test nor a train split: name another benchmark")
        strings = [text for _, row in read_rows(source, split) for text in benchmark_strings(row)]
    strings = sorted({folded for s in strings if len(folded := _fold(s)) >= DECONTAMINATION_MIN_CHARS})
    if not strings:
        raise DataError(f"decontaminate_with {source}: holds no string of {DECONTAMINATION_MIN_CHARS} characters or more: "
                        "name another benchmark, or leave the key out")
    return rows.filter(is_clean, fn_kwargs={"strings": strings}, num_proc=processes(workers, len(rows)),
                       desc=f"removing pairs that contain {source}",
                       new_fingerprint=hash_of("clean", rows._fingerprint, *strings))


def benchmark_strings(row):
    """The strings that give away one benchmark row: HumanEval's docstring and solution, or else every text column."""
    if "canonical_solution" in row and "prompt" in row:
        docstrings = re.findall(r'"""(.*?)"""|\'\'\'(.*?)\'\'\'', row["prompt"], flags=re.DOTALL)
        # Leave out the doctests (">>> f(1)"): copies usually quote only the description.
        return [d.split(">>>")[0] for pair in docstrings for d in pair if d] + [row["canonical_solution"]]
    return [value for value in row.values() if isinstance(value, str)]


def is_clean(row, strings):
    """Whether a parsed row contains none of the strings, which are folded already."""
    text = _fold(" ".join(_flat(json.loads(row[name])) for name in ("prompt", "first", "second") if row[name] is not None))
    return not any(string in text for string in strings)


def _flat(value):
    return value if isinstance(value, str) else " ".join(map(message_text, value))


def _fold(text):
    return " ".join(text.lower().split())
