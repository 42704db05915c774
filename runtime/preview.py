"""What `python data.py` prints: pairs of a run as the model will see them."""

import json
from itertools import groupby

import data
from runtime import toy
from runtime.errors import UsageError
from runtime.files import printing
from runtime.model import load_tokenizer
from runtime.rendering import Renderer


def preview(config, command_line=None):
    """Print three training pairs of a run as the model will see them: special tokens in ⟦ ⟧, what is cut off in ⟪ ⟫. To be
    quick, it tokenises no more than 1,000 pairs, drawn at random, and counts what happens to these."""
    if config.objective != "adpo":
        raise UsageError("data.py shows preference pairs, and objective is sft: say --objective=adpo")
    toy.put_in_place(config)
    tokenizer = load_tokenizer(config)
    uncut = Renderer(tokenizer, 2**31, 2**31, config.auto_insert_empty_system_msg)
    pairs, _, _ = data.load_split(config, tokenizer, "train", min(1000, config.max_train_samples or 1000))
    with printing():
        for row in range(min(3, len(pairs))):
            show(tokenizer, uncut, pairs, row)


def show(tokenizer, uncut, pairs, row):
    """Print one pair.  uncut: a Renderer that cuts nothing off."""
    prompt, *responses = (json.loads(pairs.texts[row][name]) for name in ("prompt", "first", "second"))
    whole_prompt, whole_responses = uncut(prompt, responses)
    prompt_ids, *response_ids = pairs.token_ids([row])[0]
    print(f"\n--- pair {pairs.ids[row]} ({pairs.texts[row]['place']})")
    cut = len(whole_prompt) - len(prompt_ids)
    bos = int(cut > 0 and prompt_ids[0] == whole_prompt[0] == tokenizer.bos_token_id)
    print(f"prompt, {len(prompt_ids)} tokens: {marked(tokenizer, whole_prompt[:bos])}"
          f"{marked(tokenizer, whole_prompt[bos:bos + cut], 'cut')}{marked(tokenizer, whole_prompt[bos + cut:])}")
    for name, ids, whole in zip(("y1", "y2"), response_ids, whole_responses):
        print(f"{name}, {len(ids)} tokens: {marked(tokenizer, ids)}{marked(tokenizer, whole[len(ids):], 'cut')}")


def marked(tokenizer, ids, cut=None):
    """Token ids as text on one line, special tokens as ⟦name⟧. cut: in ⟪ ⟫, with their number, if there are any."""
    special, parts = set(tokenizer.all_special_ids), []
    for is_special, some in groupby(ids, lambda id: id in special):
        parts += [f"⟦{token}⟧" for token in tokenizer.convert_ids_to_tokens(list(some))] if is_special else [
            tokenizer.decode(list(some)).replace("\n", "↵")]
    text = "".join(parts)
    return f"⟪{len(ids)} tokens cut off: {text}⟫" if cut and len(ids) else text
