"""The config: one flat typed dataclass, with a default, a help text and a range for every key.

Keys have the names that Hugging Face, TRL and the alignment handbook use, so that their recipes run unchanged. This file
only declares them. runtime/parse.py reads them from a YAML file and the command line; it also has the keys that other
recipes set but that decide nothing here.

    python train.py --help        lists every key with its default
"""

from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the repository


def key(default, help, choices=None, low=None, high=None):
    """A key of the config. choices: the only values allowed.  low, high: its range, both ends included."""
    factory = {"default_factory": lambda: default} if isinstance(default, (list, dict)) else {"default": default}
    return field(metadata={"help": help, "choices": choices, "low": low, "high": high}, **factory)


# The choices for loss_type, oracle and judge are the names in the tables that implement them: parse.CHOICES.
@dataclass
class Config:
    # Model
    model_name_or_path: str = key(None, "policy to train: hub id or folder; `toy` is the model of the built-in task")
    model_revision: str = key("main", "branch, tag or commit of a hub model")
    tokenizer_name_or_path: str | None = key(None, "tokenizer to use instead of the model's own")
    ref_model_name_or_path: str | None = key(None, "reference policy; null: the policy before its first step")
    attn_implementation: str | None = key(None, "attention in transformers: eager, sdpa, flash_attention_2, …")
    trust_remote_code: bool = key(False, "run code that comes with the model")
    # Adapter (peft)
    use_peft: bool = key(False, "train a LoRA adapter instead of all weights")
    lora_r: int = key(16, "rank of the adapter", low=1)
    lora_alpha: int = key(32, "the adapter's output is multiplied by lora_alpha / lora_r", low=1)
    lora_target_modules: list[str] | None = key(None, "layers that get an adapter, or all-linear; null: peft's choice for "
                                                      "this kind of model")
    lora_modules_to_save: list[str] | None = key(None, "layers to train in full and save with the adapter")
    merge_adapter: bool = key(False, "merge the adapter into the weights and save a plain model")
    load_in_4bit: bool = key(False, "hold the frozen weights in 4 bits (needs bitsandbytes and a GPU)")
    bnb_4bit_quant_type: str = key("nf4", "number format of the 4 bits", choices=("nf4", "fp4"))
    use_bnb_nested_quant: bool = key(False, "quantise the constants of the quantisation too")
    # Data
    dataset_mixer: dict[str, float] = key(None, "sources, each with the share of its training pairs to use; a source is a "
                                                "hub id, a folder or a file")
    dataset_splits: list[str] = key(["train", "test"], "splits to use; those with `train` in their name are for training, "
                                                       "the others for evaluation")
    dataset_configs: list[str] | None = key(None, "config name of each source in dataset_mixer, in the same order")
    preprocessing_num_workers: int | None = key(None, "processes that tokenise; null: one per core", low=1)
    chat_template: str | None = key(None, "template to use instead of the tokenizer's own: its text, or a .jinja file")
    auto_insert_empty_system_msg: bool | None = key(None, "begin a conversation without a system message with an empty one, "
                                                         "if the template takes it; null: only for the alignment handbook's "
                                                         "models, which were fine-tuned so")
    max_length: int = key(1024, "most tokens of a prompt and one response; the response is cut on the right", low=2)
    max_prompt_length: int = key(512, "most tokens of a prompt; it is cut on the left", low=1)
    max_train_samples: int | None = key(None, "train on at most this many pairs, chosen at random", low=1)
    max_eval_samples: int | None = key(None, "evaluate on at most this many pairs, chosen at random", low=1)
    decontaminate_with: str | None = key(None, "drop pairs that contain text from this benchmark (openai_humaneval, a data "
                                               "set, or a text file)")
    objective: str = key("adpo", "adpo (DPO if data_selection is false), or sft: the mean negative log-likelihood of the "
                                 "response tokens of rows {messages} or {prompt, completion}", choices=("adpo", "sft"))
    # ADPO (with objective sft, this group and the next must keep their defaults: parse.check_sft)
    beta: float = key(0.1, "β: how strongly the policy is pulled towards the reference", low=1e-6)
    gamma: float = key(1.3, "γ: ask about a pair if |margin| ≤ γ; in units of reward, so it depends on beta", low=0)
    data_selection: bool = key(True, "use the gate; false: ask about every pair, which is plain DPO")
    pseudo_labels: bool = key(True, "train a pair that is not asked about on sign(margin); false: it has no loss")
    label_budget: float | None = key(None, "instead of the gate: buy this share of the labels (up to 1), or this many, "
                                           "before the first step; a committee of reward models learns from them and "
                                           "gives every pair a soft label", low=1e-6)
    committee_size: int = key(4, "number of reward models in the committee", low=2)
    committee_epochs: float = key(2.0, "passes of each reward model over the labels bought", low=0.01, high=1e6)
    committee_learning_rate: float | None = key(None, "peak learning rate of the reward models; null: learning_rate", low=0)
    committee_batch_size: int = key(16, "pairs in a step of a reward model, over all ranks", low=1)
    loss_type: str = key("sigmoid", "loss of a pair: sigmoid is DPO's; ipo draws margins to ½, so gamma has to be lower; "
                                     "with hinge, pseudo-labels have no loss from gamma = 1 on")
    label_smoothing: float = key(0.0, "ε in the sigmoid loss; it draws margins to log((1 − ε)/ε), so gamma has to be "
                                         "lower", low=0, high=0.5)
    # Who answers
    oracle: str = key("dataset", "who labels the pairs: dataset (the labels that came with the data), human (people, with "
                                 "tools/label.py) or judge (a model)")
    oracle_wait_minutes: float = key(60.0, "stop after this long without an answer; the same command resumes the run", low=0)
    max_queries: int | None = key(None, "most labels to buy in the whole run; null: no limit", low=0)
    after_budget: str = key("none", "what an unsure pair gets once max_queries labels are bought: no label (none) or its "
                                    "pseudo-label", choices=("none", "pseudo_label"))
    ties: str = key("none", "what a pair gets whose answer has no preference: no loss (none), or a target of one half "
                            "(half, with loss_type sigmoid)", choices=("none", "half"))
    price_per_label: float | None = key(None, "price of a label, for reporting what the labels cost", low=0)
    audit_fraction: float = key(0.0, "share of the confident pairs to ask about as well, to measure how often pseudo-labels "
                                     "are wrong; 0.05 is a good value", low=0, high=1)
    judge: str = key("chat", "kind of judge: chat (an OpenAI-compatible endpoint) or reward_model (a sequence classifier)")
    judge_url: str | None = key(None, "base URL of the endpoint, such as http://127.0.0.1:8000/v1")
    judge_model: str | None = key(None, "name of the judge at its endpoint, or hub id or folder of the reward model")
    judge_device: str | None = key(None, "where the reward model runs, such as cpu or cuda:1; null: on the GPU of the first "
                                         "process, whose memory it shares")
    judge_api_key_env: str = key("OPENAI_API_KEY", "environment variable with the endpoint's API key, if it needs one")
    judge_concurrency: int = key(8, "requests to send at the same time", low=1)
    judge_timeout: float = key(60.0, "seconds that a request may take", low=0.1, high=86400)
    judge_prompt: str | None = key(None, "YAML file with the judge's rubric: the prompt and the forms of the verdicts; "
                                         "null: labels/rubrics/default.yaml")
    judge_max_tokens: int = key(512, "most tokens of a reply; a model that reasons first needs thousands", low=1)
    judge_extra_body: dict[str, object] | None = key(None, "more fields for each request to the endpoint, such as "
                                                           "{reasoning_effort: low}; null as a value leaves a field out")
    judge_disagreement: str = key("tie", "what a pair gets if the verdicts in both orders disagree, or prefer neither "
                                         "response: no preference (tie), a random label (coin), or a second round at "
                                         "temperature 1 and then a tie (again)", choices=("tie", "coin", "again"))
    judge_unanswerable: str = key("skip", "what becomes of a pair that the judge cannot answer, because its endpoint "
                                          "refuses the text or its replies hold no verdict: no preference (skip), a "
                                          "question for people in tools/label.py (human), or the run stops (stop)",
                                  choices=("skip", "human", "stop"))
    judge_prompt_price: float | None = key(None, "price of a million prompt tokens of the judge", low=0)
    judge_completion_price: float | None = key(None, "price of a million completion tokens of the judge", low=0)
    # Optimisation
    per_device_train_batch_size: int = key(8, "pairs per device; times gradient_accumulation_steps and devices, the pairs "
                                              "of an optimiser step", low=1)
    per_device_eval_batch_size: int = key(8, "pairs per batch in evaluation, on each device", low=1)
    gradient_accumulation_steps: int = key(1, "makes an optimiser step that many times larger", low=1)
    micro_batch_tokens: int | None = key(None, "how a step is cut: tokens of a micro-batch on each device, with padding; it "
                                               "decides memory and speed, not the result; null: 1,024 on a CPU, 16,384 on a "
                                               "GPU", low=1)
    torch_compile: bool = key(False, "compile the model's layers (torch.compile): faster on a GPU, after half a minute at "
                                     "the start; not under ZeRO-3")
    deterministic: bool = key(False, "use only kernels that give the same bits each time, so that a run on a GPU resumes to "
                                     "the last bit; slower")
    group_by_length: bool = key(True, "put pairs of similar length into the same step (within windows of 2,048 pairs) to "
                                      "save padding; false: draw each step at random")
    learning_rate: float = key(5e-7, "peak learning rate", low=0)
    weight_decay: float = key(0.0, "AdamW's weight decay, on matrices only", low=0)
    max_grad_norm: float = key(1.0, "clip the gradient's norm to this; 0: do not clip", low=0)
    optim: str = key("adamw_torch", "optimiser", choices=("adamw_torch", "rmsprop"))
    lr_scheduler_type: str = key("cosine", "learning rate schedule after the warm-up",
                                 choices=("cosine", "linear", "constant", "constant_with_warmup"))
    warmup_ratio: float = key(0.1, "share of the steps used for warm-up", low=0, high=1)
    num_train_epochs: float = key(1.0, "passes over the pairs", low=0, high=1e6)
    max_steps: int = key(-1, "optimiser steps, instead of num_train_epochs; -1: not set", low=-1)
    bf16: bool = key(False, "compute in bfloat16, with fp32 weights in the optimiser")
    gradient_checkpointing: bool = key(False, "recompute activations in backward: half the memory, a fifth slower")
    logits_chunk_size: int = key(2048, "response tokens whose logits are in memory at the same time", low=1)
    deepspeed: str = key(str(ROOT / "ds_config.json"), "engine config file; values that the YAML sets are \"auto\" there")
    num_threads: int | None = key(None, "CPU threads per process; small models are several times faster with 1", low=1,
                                  high=1024)
    seed: int = key(42, "seed for the order of the pairs and for random samples", low=0, high=2**32 - 1)
    # Output
    output_dir: str = key(None, "folder for everything that the run writes")
    logging_steps: int = key(10, "steps between two rows in metrics.jsonl", low=1)
    logging_first_step: bool = key(True, "log the first step too")
    log_level: str = key("warning", "log level of transformers, datasets and DeepSpeed",
                         choices=("debug", "info", "warning", "error", "critical"))
    do_eval: bool = key(True, "evaluate at all")
    eval_strategy: str = key("no", "when to evaluate, besides at the end", choices=("no", "steps", "epoch"))
    eval_steps: int = key(100, "steps between evaluations if eval_strategy is steps", low=1)
    eval_on_start: bool = key(False, "evaluate before the first step too")
    save_strategy: str = key("steps", "when to write a checkpoint", choices=("no", "steps", "epoch"))
    save_steps: int = key(500, "steps between checkpoints if save_strategy is steps", low=1)
    save_total_limit: int | None = key(None, "keep only this many checkpoints, the latest", low=1)
    resume_from_checkpoint: str | None = key(None, "a checkpoint folder, or false; null: the latest in output_dir, if any")
    report_to: list[str] = key(["none"], "tensorboard, wandb, csv_monitor (through DeepSpeed's monitor) or none")
    push_to_hub: bool = key(False, "upload the trained model at the end")
    hub_model_id: str | None = key(None, "name of the uploaded model; null: the name of output_dir")
    hub_model_revision: str = key("main", "branch to upload to")
    # The built-in task (runtime/toy.py)
    toy_dir: str = key("outputs/toy", "folder for the built-in task, which is used if `toy` is the model or a data set")
    toy_label_noise: float = key(0.05, "share of the built-in task's labels that are wrong", low=0, high=0.5)


# Keys that may differ between a checkpoint and the run that resumes it, because they do not change what has been computed.
# Neither does a larger max_queries, nor another way to ask a judge, as long as its rubric is the same (Judge.check). How
# a step is cut into micro-batches changes only rounding, as long as it has as many pairs (checkpoint.check_same_run).
FREE_ON_RESUME = {"logging_steps", "logging_first_step", "log_level", "eval_strategy", "eval_steps", "eval_on_start",
                  "do_eval", "max_eval_samples", "per_device_eval_batch_size", "save_strategy", "save_steps",
                  "save_total_limit", "resume_from_checkpoint", "report_to", "push_to_hub", "hub_model_id",
                  "hub_model_revision", "preprocessing_num_workers", "num_threads", "output_dir",
                  "oracle_wait_minutes", "price_per_label", "judge_url", "judge_device", "judge_api_key_env",
                  "judge_concurrency", "judge_timeout", "judge_prompt", "judge_max_tokens", "judge_extra_body",
                  "judge_disagreement", "judge_unanswerable", "judge_prompt_price", "judge_completion_price",
                  "per_device_train_batch_size", "gradient_accumulation_steps", "micro_batch_tokens",
                  "gradient_checkpointing", "deepspeed", "max_queries"}


def hub_name(config):
    """The model's name on the hub. A name without a user belongs to whoever is logged in."""
    return config.hub_model_id or Path(config.output_dir).resolve().name


def is_repo_id(name):
    """Whether the hub allows a model or data set with this name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
