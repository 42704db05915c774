"""Bad models, and what must neither be run nor reached: `python -m pytest tests/test_bad_models.py`.

The rule is that of test_bad_input.py. Beyond it, no code and no pickle of a folder is ever run, and a run of local files
needs no network.
"""

import json
import math
import pickle
import re
import shutil
import subprocess
import sys
import textwrap

import datasets
import pytest
import torch
import transformers
from helpers import CHATML, ROOT, as_jsonl, assert_refused, launcher_environment, tokenizer, user
from safetensors.torch import load_file, save_file

from runtime.model import name_ends

# ----------------------------------------------------------------------------------------------------------------------
# Models

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def replace_model(folder, kind, **config):
    (folder / "model.safetensors").unlink()
    getattr(transformers, kind)(getattr(transformers, re.sub("For.*", "Config", kind))(**config)).save_pretrained(folder)


def only_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_code(file, **changes):
    """Let `file` of a model's folder name Python code in that folder, which creates "was run" if it is ever run."""
    def change(folder):
        for name in ("its_config.py", "its_model.py", "its_tokenizer.py"):
            (folder / name).write_text(f"open({str(folder.parent / 'was run')!r}, 'w')\n")
        change_json(folder / file, **changes)
    return change


BAD_MODELS = {
    "fewer embeddings than tokens": (lambda f: replace_model(f, "LlamaForCausalLM", vocab_size=300, **SMALL),
                                     r"model \S+model: has embeddings for 300 tokens, but the tokenizer has 330"),
    "an encoder": (lambda f: replace_model(f, "BertForMaskedLM", vocab_size=330, **SMALL),
                   r"bert is not a causal language model"),
    "an encoder, decoder": (lambda f: replace_model(f, "T5ForConditionalGeneration", vocab_size=330, d_model=32, d_kv=8,
                                                    d_ff=64, num_heads=4), r"model: t5 is not a causal language model"),
    "a classifier": (lambda f: replace_model(f, "LlamaForSequenceClassification", vocab_size=330, **SMALL),
                     r"its weights lack lm_head\.weight \(1 in all\)"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no file named model\.safetensors found"),
    "pickled weights": (only_pickle, r"no file named model\.safetensors .*; weights are read from safetensors alone"),
    "weights cut off": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:9999]),
                        r"model: cannot be loaded \(SafetensorError"),
    "weights of another shape": (lambda f: change_json(f / "config.json", hidden_size=40),
                                 r"cannot be loaded \(RuntimeError"),
    "one weight missing": (lambda f: change_weights(f, lambda w: w.pop("model.norm.weight")),
                           r"lack model\.norm\.weight \(1 in"),
    "other weights": (lambda f: change_weights(f, lambda w: [w.pop(k) for k in [*w] if "layers" in k]),
                      r"lack model\.layers\.0"),
    "weights that are not numbers": (lambda f: change_weights(f, lambda w: w["model.norm.weight"].fill_(math.nan)),
                                    r"by nan nats"),
    "code for the model": (with_code("config.json", model_type="its", auto_map={
        "AutoConfig": "its_config.C", "AutoModelForCausalLM": "its_model.M"}), r"code of its own: .*trust_remote_code"),
    "code for the tokenizer": (with_code("tokenizer_config.json", tokenizer_class="T", auto_map={
        "AutoTokenizer": ["its_tokenizer.T", None]}), r"tokenizer \S+: cannot be loaded .*needs code of its own"),
    "config cut off": (lambda f: (f / "config.json").write_text('{"model_type": '),
                       r"model: cannot be loaded .*not a valid JSON"),
    "config that is not an object": (lambda f: (f / "config.json").write_text("[]"), r"model: cannot be loaded \(TypeError"),
    "config empty": (lambda f: (f / "config.json").write_text("{}"), r"model: cannot be loaded .*model_type"),
    "config missing": (lambda f: (f / "config.json").unlink(), r"model: cannot be loaded .*config\.json"),
    "config of an unknown kind": (lambda f: change_json(f / "config.json", model_type="nonsense"), r"model type `nonsense`"),
    "config of wrong types": (lambda f: change_json(f / "config.json", hidden_size="80"),
                              r"'hidden_size' expected int, got str"),
    "config without a head": (lambda f: change_json(f / "config.json", num_attention_heads=0), r"ZeroDivisionError"),
    "tokenizer cut off": (lambda f: (f / "tokenizer.json").write_text("{"), r"tokenizer \S+model: cannot be loaded"),
    "tokenizer config that is not an object": (lambda f: (f / "tokenizer_config.json").write_text("[]"),
                                   r"tokenizer \S+: cannot be loaded"),
    "no tokenizer": (lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
                     r"tokenizer \S+model: cannot be loaded"),
    "nothing": (lambda f: [path.unlink() for path in f.iterdir()], r"tokenizer \S+model: cannot be loaded"),
    "no EOS": (lambda f: change_json(f / "tokenizer_config.json", eos_token=None), r"the tokenizer has no eos_token"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models_are_one_line_that_names_them(name, train, tiny, tmp_path):
    change, match = BAD_MODELS[name]
    shutil.copytree(tiny / "model", tmp_path / "model")
    change(tmp_path / "model")
    assert_refused(train, match, model_name_or_path=tmp_path / "model")
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize("keys, match", [
    (dict(model_name_or_path="nowhere/at-all"), "tokenizer nowhere/at-all: cannot be loaded .*not a local folder, and"),
    (dict(model_name_or_path="/no/such/folder"), "tokenizer /no/such/folder: cannot be loaded .*not a local folder, and"),
    (dict(ref_model_name_or_path="no-such-model"), "model no-such-model: cannot be loaded .*not a local folder, and"),
    (dict(tokenizer_name_or_path="no-such-model"), "tokenizer no-such-model: cannot be loaded"),
    (dict(attn_implementation="nonsense"), "model: cannot be loaded .*attn_implementation=.nonsense"),
    (dict(chat_template="/no/such.jinja"), r"chat_template /no/such\.jinja: cannot be read"),
    (dict(chat_template="/my/template.txt"), r"chat_template /my/template\.txt: is not a template, which has "),
])
def test_models_that_are_not_there(keys, match, train):
    assert_refused(train, match, **keys)


def test_a_reference_with_fewer_embeddings_is_refused_too(train, tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "small")
    replace_model(tmp_path / "small", "LlamaForCausalLM", vocab_size=300, **SMALL)
    assert_refused(train, "small: has embeddings for 300 tokens, but the tokenizer has 330",
                   ref_model_name_or_path=tmp_path / "small")


@pytest.mark.parametrize("key", ["ref_model_name_or_path", "tokenizer_name_or_path"])
def test_a_model_whose_own_tokenizer_has_other_tokens_is_refused(key, train, tiny, tmp_path):
    """As many tokens, so nothing else would notice that one of the models reads another text."""
    shutil.copytree(tiny / "model", tmp_path / "other")
    made = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocab = made["model"]["vocab"]
    made["model"]["vocab"] = dict(zip(vocab, [*list(vocab.values())[:10], *list(vocab.values())[:9:-1]]))
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(made))
    assert_refused(train, r"model \S+: its own tokenizer differs from the run's in \d+ of \d+ "
                          r"tokens \(id \d+ is '", **{key: tmp_path / "other"})


def test_a_reference_without_a_tokenizer_is_taken(train, tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert train("bare", ref_model_name_or_path=tmp_path / "bare", max_steps=1).losses()


def test_messages_without_a_chat_template_are_refused(train, tiny, tmp_path):
    """The tiny model has none; all other tests train it on strings."""
    (tmp_path / "train.jsonl").write_text(as_jsonl([{"prompt": [user("u")], "chosen": " good .", "rejected": " bad ."}]))
    assert_refused(train, r"train\.jsonl, row 1: messages need a chat template", dataset_mixer=f"{{{tmp_path}: 1.0}}")


@pytest.mark.parametrize("tied", [False, True])
def test_models_without_pad_and_bos_and_with_either_head_train(tied, train, tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    # More embeddings than tokens, as padded vocabularies have.
    replace_model(tmp_path / "model", "LlamaForCausalLM", vocab_size=400, tie_word_embeddings=tied, **SMALL)
    made = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(made | {"post_processor": None}))
    change_json(tmp_path / "model" / "tokenizer_config.json", pad_token=None, bos_token=None)
    run = train("head", model_name_or_path=tmp_path / "model", max_steps=2)
    assert abs(run.losses()[0] - math.log(2)) < 1e-4
    lm = transformers.AutoModelForCausalLM.from_pretrained(run.output)
    assert (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight) == tied
    assert ("lm_head.weight" in run.weights()) != tied
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.output)
    assert tokenizer.bos_token is None and tokenizer.pad_token is None


# ----------------------------------------------------------------------------------------------------------------------
# Nothing is run or reached that was not asked for

class Evil:
    """Creates a file when its pickle is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def plant(folder, was_run, *names):
    """Write files that create `was_run` when they are unpickled or run, under names that libraries look for."""
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Evil(was_run)) if not name.endswith(".py") else
                                    f"open({str(was_run)!r}, 'w')\n".encode())


def test_a_planted_file_does_run_when_it_is_loaded(tmp_path):
    plant(tmp_path, tmp_path / "was run", "model.bin")
    with pytest.raises(RuntimeError, match="Invalid magic number"):  # it is not a tensor, but by then it has run
        torch.load(tmp_path / "model.bin", weights_only=False)
    assert (tmp_path / "was run").exists()


def test_no_pickle_and_no_code_of_a_folder_is_run(train, tiny, tmp_path):
    """They lie next to good weights and pairs, in the folders of policy, reference and data. The trained model has none."""
    was_run = tmp_path / "was run"
    for name, planted in (("model", ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl", "modeling.py")),
                          ("pairs", ("pairs.py", "pairs.pkl", "train.pkl", "train.pt", "dataset.py"))):
        shutil.copytree(tiny / name, tmp_path / name)
        plant(tmp_path / name, was_run, *planted)
    run = train("planted", model_name_or_path=tmp_path / "model", ref_model_name_or_path=tmp_path / "model",
                dataset_mixer=f"{{{tmp_path}/pairs: 1.0}}", max_steps=1)
    assert not was_run.exists() and len(run.rows()) == 1
    assert not [path for path in run.output.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("what", ["policy", "reference", "reward model"])
def test_weights_that_exist_only_as_pickles_are_refused_and_not_run(what, train, tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    plant(tmp_path / "model", tmp_path / "was run", "pytorch_model.bin", "training_args.bin")
    keys = {"policy": dict(model_name_or_path=tmp_path / "model"),
            "reference": dict(ref_model_name_or_path=tmp_path / "model"),
            "reward model": dict(oracle="judge", judge="reward_model", judge_model=tmp_path / "model")}
    assert_refused(train, r"model: cannot be loaded.*model\.safetensors", **keys[what])
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize("name", ["pairs.py", "train.py"])
def test_a_loading_script_is_not_a_data_set(name, train, tmp_path):
    """Neither its folder nor the file. The library once ran the code that came with a data set."""
    (tmp_path / "pairs").mkdir()
    plant(tmp_path / "pairs", tmp_path / "was run", name)
    assert_refused(train, r"pairs: has no split train", dataset_mixer=f"{{{tmp_path}/pairs: 1.0}}")
    assert_refused(train, r"\.py: a file must end in one of", dataset_mixer=f"{{{tmp_path}/pairs/{name}: 1.0}}")
    with pytest.raises(RuntimeError, match="scripts are no longer supported"):  # as for a script on the hub
        datasets.load_dataset(str(tmp_path / "pairs" / name))
    assert not (tmp_path / "was run").exists()


# Every name look-up and every connection that leaves this machine is recorded and fails. If the system allows it, the
# process has no network at all (`unshare --net`) except its own loopback, which is switched on here.
GUARD = """
import fcntl, ipaddress, runpy, socket, struct, sys
_, reached, *sys.argv = sys.argv

def local(host):
    try:
        return host in (None, "", "localhost", socket.gethostname()) or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

def watch(event, args):
    if event == "socket.connect" and args[0].family != socket.AF_UNIX:
        host = args[1][0]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0].decode() if isinstance(args[0], bytes) else args[0]
    else:
        return
    if not local(host):
        with open(reached, "a") as file:
            file.write(f"{event} {host}\\n")
        raise OSError(f"{event} {host}: no network here")

with socket.socket() as probe:
    try:
        fcntl.ioctl(probe, 0x8914, struct.pack("16sh14x", b"lo", 0x49))  # SIOCSIFFLAGS: up, loopback, running
    except OSError:
        pass  # without unshare this is the machine's loopback, which is up
sys.addaudithook(watch)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def guarded(tmp_path):
    """guarded(program, *arguments) → (the finished process, what it tried to reach). It has no network, HF_HUB_OFFLINE is
    not set, and there is a token with which something could be pushed."""
    unshare = ["unshare", "--map-root-user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        unshare = []
    (tmp_path / "guard.py").write_text(GUARD)

    def run(program, *arguments):
        environment = launcher_environment() | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "x"}
        del environment["HF_HUB_OFFLINE"]
        done = subprocess.run([*unshare, sys.executable, str(tmp_path / "guard.py"), str(tmp_path / "reached"), str(program),
                               *map(str, arguments)], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=240)
        return done, (tmp_path / "reached").read_text() if (tmp_path / "reached").exists() else ""
    return run


def test_the_guard_sees_what_a_program_tries_to_reach(guarded, tmp_path):
    (tmp_path / "program.py").write_text("import huggingface_hub\nhuggingface_hub.HfApi().whoami()\n")
    done, reached = guarded(tmp_path / "program.py")
    assert done.returncode == 1 and "huggingface.co" in reached


def test_a_local_run_needs_no_network_and_pushes_nothing(guarded, tiny, tmp_path):
    """The quickstart in small, with all that it does except generating: evaluation, checkpoints, a reference."""
    (tmp_path / "c.yaml").write_text(f"""
model_name_or_path: {tiny}/model
ref_model_name_or_path: {tiny}/model
dataset_mixer: {{{tiny}/pairs: 1.0}}
decontaminate_with: {tmp_path}/benchmark.txt
max_length: 64
max_prompt_length: 16
max_steps: 4
num_threads: 1
eval_strategy: steps
eval_steps: 2
eval_on_start: true
save_steps: 2
output_dir: {tmp_path}/out
""")
    (tmp_path / "benchmark.txt").write_text("a string of a benchmark that is in none of the pairs\n")
    done, reached = guarded(ROOT / "train.py", "--config", tmp_path / "c.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert reached == "" and "held-out accuracy" in done.stdout and (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("eos, given, saved", [("</s>", 2, [2, 4]), ("</s>", [2, 4, 7], [2, 4, 7]), ("<|im_end|>", 4, 4)])
def test_a_saved_model_stops_where_its_responses_ended(eos, given, saved):
    """With CHATML a response ends in <|im_end|>, token 4, whatever the tokenizer's EOS is."""
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                                                num_attention_heads=1, vocab_size=16))
    lm.generation_config.eos_token_id = given
    name_ends(lm, tokenizer(eos=eos, template=CHATML))
    assert lm.generation_config.eos_token_id == saved


@pytest.mark.parametrize("adapter", [{}, {"use_peft": True, "merge_adapter": True}], ids=["whole", "merged"])
def test_a_model_with_settings_for_generation_that_do_not_count_is_saved_with_them(adapter, train, tiny, tmp_path):
    """Vicuna has a temperature without do_sample, which transformers does not save beside ends of our own."""
    if adapter:
        pytest.importorskip("peft")
    shutil.copytree(tiny / "model", tmp_path / "model")
    settings = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2, "num_beams": 1, "early_stopping": True}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    run = train("generation", model_name_or_path=tmp_path / "model", max_steps=1, **adapter)
    saved = json.loads((run.output / "generation_config.json").read_text())
    assert saved == {**settings, "eos_token_id": [2, 3], "transformers_version": saved["transformers_version"]}


def test_a_model_with_code_of_its_own_and_without_generate_is_saved(train, tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    (tmp_path / "model" / "its_model.py").write_text(textwrap.dedent("""
        from torch.nn import Linear
        from transformers import LlamaConfig, LlamaModel, PreTrainedModel
        from transformers.modeling_outputs import CausalLMOutput
        class C(LlamaConfig):
            model_type = "its"
        class M(PreTrainedModel):
            config_class, base_model_prefix, _supports_sdpa = C, "model", True
            _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
            def __init__(self, config):
                super().__init__(config)
                self.model = LlamaModel(config)
                self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
                self.post_init()
            def get_input_embeddings(self):
                return self.model.embed_tokens
            def get_output_embeddings(self):
                return self.lm_head
            def forward(self, **inputs):
                return CausalLMOutput(logits=self.lm_head(self.model(**inputs).last_hidden_state))
        """))
    change_json(tmp_path / "model" / "config.json", model_type="its", architectures=["M"],
                auto_map={"AutoConfig": "its_model.C", "AutoModelForCausalLM": "its_model.M"})
    run = train("own-code", model_name_or_path=tmp_path / "model", trust_remote_code=True, max_steps=1)
    assert not (run.output / "generation_config.json").exists() and "WARNING" not in run.stdout
    assert type(transformers.AutoModelForCausalLM.from_pretrained(run.output, trust_remote_code=True)).__name__ == "M"


def test_a_tokenizer_with_code_of_its_own_is_saved_so_that_it_loads(train, tiny, tmp_path):
    """transformers 5 writes the name of its class in a form that it does not read."""
    shutil.copytree(tiny / "model", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    (tmp_path / "model" / "its_tokenizer.py").write_text(textwrap.dedent("""
        from transformers import PreTrainedTokenizer
        class T(PreTrainedTokenizer):
            vocab_size = 256
            def get_vocab(self):
                return {chr(id): id for id in range(256)} | self.added_tokens_encoder
            def _tokenize(self, text):
                return list(text)
            def _convert_token_to_id(self, token):
                return ord(token) % 256
            def _convert_id_to_token(self, id):
                return chr(id)
            def save_vocabulary(self, folder, filename_prefix=None):
                return ()
        """))
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["its_tokenizer.T", None]}, "eos_token": "</s>"}))
    run = train("own-tokenizer", model_name_or_path=tmp_path / "model", trust_remote_code=True, max_steps=1)
    assert "WARNING" not in run.stdout
    first, saved = (transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
                    for folder in (tmp_path / "model", run.output))
    assert type(saved).__name__ == "T" and saved("ab</s>").input_ids == first("ab</s>").input_ids
