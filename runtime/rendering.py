"""From text to token ids: chat templates, special tokens, truncation.

    Renderer(tokenizer, 512, 1024).render([(prompt, [response, response])])     token ids of many pairs, and notes

Departures from the official code: the prompt is, token for token, what the model is given at inference. A response is what
follows the prompt in the templated conversation, not a conversation of its own. Where a template leaves out part of a pair,
the pair is refused.
"""

import json
import os
import re
from itertools import chain, pairwise

import jinja2

from runtime.errors import DataError
from runtime.formats import SENTINEL, function_name, hh_messages, message_text, squeezed, template_input
from runtime.sources import hash_of

# Increase this with any change to what a row becomes, so that a run that was begun before it is not resumed.
VERSION = 7

# What happened to a pair on its way to tokens, counted and said by load_pairs.
PROMPT_CUT, RESPONSE_CUT = "with the prompt cut to max_prompt_length", "with a response cut to max_length"
SHORTENED = "with an earlier reply that the chat template shortens, as at inference"
KEPT_AS_TEXT = "with the text of a special token inside a message, kept as text"
UNTEMPLATED = "of plain strings, used as they are, without the chat template"
LATER_TURNS = "with a later turn of the user in a response, scored as if the model had written it"


class Renderer:
    """Turns pairs into token ids: chat template, one BOS if the model uses one, exactly one end, truncation.

    tokenizer: a transformers tokeniser.  max_prompt_length, max_length: in tokens.
    empty_system: begin with an empty system message if a conversation has none and the template takes one.
    ends: ids of the tokens that end a reply: EOS, and what the template writes after a reply.
    """

    def __init__(self, tokenizer, max_prompt_length, max_length, empty_system=False):
        self.tokenizer, self.max_prompt_length, self.max_length = tokenizer, max_prompt_length, max_length
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no eos_token: set one, or responses never end")
        self.eos, self.blank = tokenizer.eos_token_id, {}  # {token: whether it is white space}
        # The model uses a BOS if its tokeniser adds one. Qwen and GPT-2 name a BOS but never use it.
        ids = tokenizer("a").input_ids
        self.bos = tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None
        self.line = tokenizer("\n", add_special_tokens=False).input_ids
        template = str(tokenizer.chat_template or "")
        self.border = self._border(template)
        self.empty_system = empty_system and ("system" in template or "<|im_start|>" in template) and (
            self._rendered([{"role": "system", "content": ""}, {"role": "user", "content": "a"}]) is not None)
        self.ends = self._ends()
        self.end_texts = {tokenizer.convert_ids_to_tokens(id) for id in self.ends}
        self.protected = self._protected(template)

    def fingerprint(self):
        """Hash of everything that decides which tokens a text becomes."""
        content = repr(self.tokenizer)
        if self.tokenizer.is_fast:  # padding and truncation are left over from its last call and do not matter
            content = {**json.loads(self.tokenizer.backend_tokenizer.to_str()), "padding": None, "truncation": None}
        return hash_of(VERSION, content, self.tokenizer.chat_template, self.tokenizer.special_tokens_map, self.bos, self.eos,
                       self.max_prompt_length, self.max_length, self.empty_system)

    # The chat template.

    def chat(self, messages, ask=False):
        """The text that the chat template makes of messages. ask: as a prompt, so that a reply can follow."""
        messages, tools = template_input(messages)
        return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)

    def _rendered(self, messages):
        """Render with `chat`. Returns None without a template, or if the template rejects these messages."""
        try:
            return self.chat(messages) if self.tokenizer.chat_template else None
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
            return None

    def _protected(self, template):
        """{role: pattern of the tokens whose text inside a message is text}; None for any role but the assistant's.

        Those are the special tokens, and what the template writes around turns. An assistant may write the other special
        tokens that the template knows (Magistral's [THINK]).
        """
        talk = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
        turns = self._rendered(talk) or self._rendered(talk[1:]) or ""
        added = self.tokenizer.added_tokens_decoder.values()
        texts = {token.content for token in added if (token.special or token.content in turns) and token.content[1:]}
        kept = self.end_texts | {self.tokenizer.bos_token, self.tokenizer.pad_token, self.tokenizer.unk_token}
        writable = {text for text in texts - kept if text in template and text not in turns}
        return {"assistant": _any_of(texts - writable), None: _any_of(texts)}

    def _ends(self):
        """Ids of the tokens that end a reply: EOS, and the special token that the template writes after a reply."""
        asked = [{"role": "user", "content": "a"}]
        call = {"type": "function", "id": "abcdefghi", "function": {"name": "look_up", "arguments": {"a": "b"}}}
        plain = self._rendered([*asked, {"role": "assistant", "content": SENTINEL}])
        after = self._special(plain.rpartition(SENTINEL)[2].lstrip())[:1] if plain else []
        if not after or after[0] is None:
            return {self.eos}
        calling = self._rendered([*asked, {"role": "assistant", "content": "", "tool_calls": [call]}])
        last = self._special(calling.rstrip())[-1:] if calling and "look_up" in calling else []  # gpt-oss's <|call|>
        return {self.eos, *after, *last} - {None}

    def _special(self, text):
        """Ids of a text's tokens, with None for those that are not special."""
        added = self.tokenizer.added_tokens_decoder
        return [id if id in added and added[id].special else None
                for id in self.tokenizer(text, add_special_tokens=False).input_ids]

    def _protect(self, messages):
        """Messages in which special-token text is plain text: it gets a sentinel after its first character."""
        def protect(value, pattern):
            if isinstance(value, str):
                return pattern.sub(lambda found: found[0][0] + SENTINEL + found[0][1:], value)
            if isinstance(value, dict):
                return {name: protect(item, pattern) for name, item in value.items()}
            return [protect(item, pattern) for item in value]
        return [protect(m, self.protected.get(m["role"], self.protected[None])) for m in messages]

    def texts(self, prompt, responses):
        """(prompt text, [prompt and response text] * 2, notes) as the model will read them. Raises DataError."""
        later = [LATER_TURNS] * any("\n\nHuman:" in response if isinstance(response, str) else
                                    any(message["role"] == "user" for message in response) for response in responses)
        messages = hh_messages(prompt) if self.tokenizer.chat_template else None
        if messages:
            responses = [[{"role": "assistant", "content": response.strip()}] for response in responses]
            prompt = messages
        if isinstance(prompt, str):  # the user's own text, in which a special token is that token
            notes = later + [UNTEMPLATED] * bool(self.tokenizer.chat_template)
            return prompt, [prompt + response for response in responses], notes
        prompt, start, notes = self._prompt_text(prompt)
        notes, full = later + notes, []
        for response in map(self._protect, responses):
            full.append(self._whole_text(prompt, start, response))
            notes += [KEPT_AS_TEXT] * (SENTINEL in full[-1])
        return start, full, notes

    def _prompt_text(self, prompt):
        """(protected messages, the text that the model is given at inference, notes) of a prompt of messages."""
        if not self.tokenizer.chat_template:
            raise DataError("messages need a chat template and the tokenizer has none: set chat_template")
        first = next((n for n, message in enumerate(prompt) if message["role"] != "tools"), len(prompt))
        if self.empty_system and prompt[first:] and prompt[first]["role"] != "system":
            prompt = [*prompt[:first], {"role": "system", "content": ""}, *prompt[first:]]
        prompt = self._protect(prompt)
        start = self.chat(prompt, ask=True)
        return prompt, start, [SHORTENED] * self._is_shortened(prompt, start)

    def _is_shortened(self, prompt, text):
        """Whether the template leaves out part of an earlier reply, such as its reasoning. Raises DataError where it leaves
        out something that the reply depends on."""
        shortened = False
        for n, message in enumerate(prompt):
            lost, role = left_out(message, text), message["role"]
            if "content" in lost and role != "tools":  # does the template rewrite it, or is it not there at all?
                marked = self.chat([*prompt[:n], {**message, "content": SENTINEL}, *prompt[n + 1:]], ask=True)
                if SENTINEL in marked:
                    lost.remove("content")
                    shortened |= role == "assistant"
            if {"content", "tool_calls"} & set(lost):
                what = "the tools" if role == "tools" else f"the {lost[0]} of a message of role {role}"
                raise DataError(f"the chat template leaves out {what}: set another chat_template, or take it out of the row")
            shortened |= bool(lost)
        return shortened

    def _whole_text(self, prompt, start, response):
        """The text of prompt and response. It begins with `start`, the text of the prompt, as at inference."""
        text = self.chat(prompt + response)
        goes_on = text.startswith(start)
        lost = [field for message in response for field in left_out(message, text[len(start) * goes_on:])]
        if goes_on and not lost:
            return text
        # The template rewrites a finished reply (R1's removes the reasoning), or the prompt that it writes for inference
        # begins the reply (<think>). What the model generates after that prompt is the rest of the content, and an end.
        content = response[0]["content"]
        around = self._around_reply(prompt, start, response[0]) if len(response) == 1 and set(lost) <= {"content"} else None
        if around:
            begun, end = around
            if not begun.strip():
                return start + content + end
            if content.lstrip().startswith(begun.strip()):
                content = content.lstrip()[len(begun.strip()):].removeprefix(begun[len(begun.rstrip()):])
                return start + content + end
            raise DataError(f"the chat template ends a prompt with {begun.strip()!r:.80}, and a response does not begin so: "
                            "put it there, with what the model should think, or set another chat_template")
        if lost:
            raise DataError(f"the chat template leaves out the {lost[0]} of a response: set another chat_template, or write "
                            "it into content as the model would")
        advice = ", or put the system message into the user's" if any(m["role"] == "system" for m in prompt) else ""
        raise DataError("the chat template does not render a conversation as the continuation of its prompt: set another "
                        f"chat_template{advice}")

    def _around_reply(self, prompt, start, message):
        """(what `start`, the text of the prompt, has begun of a reply, what the template writes after the reply's content),
        or None if the template does not continue the prompt.  prompt: protected messages."""
        marked = self._rendered([*prompt, {**message, "content": SENTINEL}])
        if marked is None or not marked.startswith(self.chat(prompt)):
            return None
        return start[len(os.path.commonprefix([start, marked])):], marked.rpartition(SENTINEL)[2]

    def begun(self, prompt):
        """What the template writes of a reply when it asks for one (R1's "<think>"), or "".  prompt: messages."""
        prompt, start, _ = self._prompt_text(prompt)
        begun, _ = self._around_reply(prompt, start, {"role": "assistant"}) or ("", "")
        return begun if begun.strip() else ""

    # Token ids.

    def _border(self, template):
        """Pattern of the places where a text can be cut without changing its tokens.

        Those are the places before each special token that the template writes, because a fast tokeniser splits there
        before it does anything else. Some special tokens do not qualify, because they affect their surroundings: one that
        takes the space on its left, that may not touch a word, that is matched in normalised text only, or that overlaps
        with another added token.
        """
        if not self.tokenizer.is_fast or self.tokenizer.split_special_tokens:
            return _any_of(())
        added = self.tokenizer.added_tokens_decoder.values()
        contents = {token.content for token in added}

        def overlaps(text):
            starts = tuple(text[:n] for n in range(1, len(text)))
            return text[0].isspace() or any(other.endswith(starts) or text in other and text != other for other in contents)

        written = [token.content for token in added
                   if token.special and not (token.lstrip or token.single_word or token.normalized)
                   and (token.content in template or token.content == self.tokenizer.eos_token)]
        return _any_of(text for text in written if not overlaps(text))

    def tokenise(self, texts):
        """{text: its token ids, nothing added}, in one call.

        Texts are cut at their borders and each distinct piece is tokenised once. The three texts of a pair share a prompt.
        """
        cut = {}
        for text in texts:
            bounds = [0, *(border.start() for border in self.border.finditer(text)), len(text)]
            cut[text] = [text[a:b] for a, b in pairwise(bounds) if a < b]
        pieces = list(dict.fromkeys(chain.from_iterable(cut.values())))
        ids = self.tokenizer(pieces, add_special_tokens=False, return_attention_mask=False).input_ids if pieces else []
        ids = dict(zip(pieces, ids))
        return {text: list(chain.from_iterable(ids[piece] for piece in parts)) for text, parts in cut.items()}

    def encode(self, texts):
        """{text: its token ids, nothing added}. A text with sentinels is split there and its pieces tokenised separately."""
        split = {text: text.split(SENTINEL) for text in texts}
        first = self.tokenise(pieces[0] for pieces in split.values())
        # Tokenise each later piece after a newline, then drop the newline, so that a mid-text piece gets no leading "▁".
        later = {piece for pieces in split.values() for piece in pieces[1:]}
        after_line = {text[1:]: ids for text, ids in self.tokenise("\n" + piece for piece in later).items()}
        n = len(self.line)
        merged = [piece for piece, ids in after_line.items() if ids[:n] != self.line]  # newline inside a longer token
        later = {piece: ids[n:] for piece, ids in after_line.items()} | self.tokenise(merged)
        return {text: sum((later[piece] for piece in pieces[1:]), first[pieces[0]]) for text, pieces in split.items()}

    def one_end(self, ids):
        """`ids` of a reply, cut after the first of the end tokens at its close; without one, EOS is added. What a template
        writes after the end of a turn (a newline, an EOS of its own) is never generated."""
        end = None
        for n in range(len(ids) - 1, -1, -1):
            if ids[n] in self.ends:
                end = n
            elif not self._is_blank(ids[n]):
                break
        return ids + [self.eos] if end is None else ids[:end + 1]

    def _is_blank(self, id):
        if id not in self.blank:
            self.blank[id] = not self.tokenizer.decode([id]).strip()
        return self.blank[id]

    def __call__(self, prompt, responses):
        """(prompt_ids, [response_ids, response_ids]) of one pair."""
        return self.render([(prompt, responses)])[0][:2]

    def prompt_ids(self, prompt):
        """Token ids of a prompt as the model is given it at inference."""
        if not isinstance(prompt, str) or self.tokenizer.chat_template and hh_messages(prompt):
            _, prompt, _ = self._prompt_text(hh_messages(prompt) or prompt)
        return self.cut(self.encode([prompt])[prompt], [], [])[0]

    def render(self, pairs):
        """Token ids of pairs (prompt, [response, response]), each part a string or messages. Many at once is faster.

        A prompt keeps its last max_prompt_length tokens, a response its first max_length − len(prompt). A response comes
        back as [] if its text is empty or if no room is left for it.
        Returns [(prompt_ids, [response_ids, response_ids], notes)].
        """
        texts = [self.texts(*pair) for pair in pairs]
        ids = self.encode({text for prompt, full, _ in texts for text in (prompt, *full)})
        # The prompt's tokens are the ones that the model sees at inference. The response's tokens are those that follow
        # them; if the tokeniser merges across the border, the response is tokenised on its own.
        apart = {(prompt, f): (SENTINEL if prompt else "") + f[len(prompt):] for prompt, full, _ in texts for f in full
                 if ids[f][:len(ids[prompt])] != ids[prompt]}
        own = self.encode(set(apart.values()))
        out = []
        for (_, responses), (prompt, full, notes) in zip(pairs, texts):
            response_ids = [own[apart[prompt, f]] if (prompt, f) in apart else ids[f][len(ids[prompt]):] for f in full]
            prompt_ids, response_ids, cuts = self.cut(ids[prompt], responses, response_ids)
            out.append((prompt_ids, response_ids, [*dict.fromkeys(notes + cuts)]))
        return out

    def cut(self, prompt_ids, responses, response_ids):
        """(prompt_ids, response_ids, notes) with one BOS and one end, cut to max_prompt_length and max_length."""
        while self.bos is not None and prompt_ids[:1] == [self.bos]:
            prompt_ids = prompt_ids[1:]
        bos = [] if self.bos is None else [self.bos]
        if not bos and prompt_ids[:1] == [self.tokenizer.bos_token_id] and "bos_token" in str(self.tokenizer.chat_template):
            bos, prompt_ids = prompt_ids[:1], prompt_ids[1:]  # the template adds the BOS, not the tokeniser (OLMo 2)
        keep = self.max_prompt_length - len(bos)
        notes = [PROMPT_CUT] * (len(prompt_ids) > keep)
        prompt_ids = bos + prompt_ids[max(len(prompt_ids) - keep, 0):]
        if not prompt_ids:
            if self.tokenizer.bos_token_id is None:
                raise DataError("the prompt is empty and the tokenizer has no bos_token to predict the first token from: "
                                "write a prompt, or set a bos_token")
            prompt_ids = [self.tokenizer.bos_token_id]
        room = max(self.max_length - len(prompt_ids), 0)
        whole = [[] if self._is_empty(response) else self.one_end(ids) for response, ids in zip(responses, response_ids)]
        return prompt_ids, [ids[:room] for ids in whole], notes + [RESPONSE_CUT] * any(len(ids) > room for ids in whole)

    def _is_empty(self, response):
        """Whether a response says nothing. The end of a turn in a string is not something that is said."""
        if not isinstance(response, str):
            return not any(message_text(message).strip() for message in response)
        for end in self.end_texts:
            response = response.replace(end, "")
        return not response.strip()


def _any_of(texts):
    """Pattern that finds any of these texts, the longest first; nothing if there is none."""
    return re.compile("|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True))) or "(?!)")


def left_out(message, text):
    """The fields of a message that are not in a text. White space does not count."""
    tools = json.loads(message["content"]) if message["role"] == "tools" else None
    parts = {"content": [message["content"]] if tools is None else map(function_name, tools),
             "tool_calls": map(function_name, message.get("tool_calls", ())),
             "reasoning_content": [message.get("reasoning_content", "")]}
    return [field for field, values in parts.items() if not all(
        value.strip() in text or squeezed(value) in squeezed(text) for value in values)]
