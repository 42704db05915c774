"""How the labelling page shows a text: as Markdown, as it was written, or as the difference of two responses.

    turns(text)               a prompt or response, from its JSON, as [{"role", "text", "html"}]
    difference(a, b)          which words of two responses differ, side by side

Responses come from models and may hold anything. markdown-it-py renders them with raw HTML switched off, nh3 removes every
tag and attribute that is not listed here, and links and images stay as they are written: nothing can be clicked, loaded or
run. If rendering would hide a letter, the page shows the text as it was written and says so.

The paper and the official code ask nobody. Needs tools/requirements.txt.
"""

import difflib
import functools
import html
import json
import os
import re

import nh3
from markdown_it import MarkdownIt

from runtime.formats import hh_messages, message_text

TAGS = set("p br hr em strong s code pre small blockquote ul ol li table thead tbody tr th td h1 h2 h3 h4 h5 h6".split())
LONGEST = 200_000  # characters that are rendered; a longer text is shown as it was written
MOST_WORDS = 3_000  # of a response whose difference is shown: difflib's time grows with their square
NEARLY = 0.8  # responses that share this much of their words are called nearly equal


def make_parser():
    # Without the rules that would hide what they match: the address of a link, or the name of a character.
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True, "linkify": False}).enable(["table", "strikethrough"])
    parser.disable(["link", "image", "autolink", "reference", "html_block", "html_inline", "entity"])

    def item(self, tokens, at, options, env):  # a list is numbered as it was written
        number = tokens[at].info
        return f'<li value="{number}">' if number else "<li>"

    def fence(self, tokens, at, options, env):  # what follows ``` is part of the text
        info = tokens[at].info.strip()
        return (f"<pre>{f'<small>{html.escape(info)}</small>' if info else ''}"
                f"<code>{html.escape(tokens[at].content)}</code></pre>\n")
    parser.add_render_rule("list_item_open", item)
    parser.add_render_rule("fence", fence)
    return parser


PARSER = make_parser()


@functools.lru_cache(maxsize=512)  # a page asks for its question again every 25 s
def rendered(text):
    """A text as HTML that is safe to show, or None if the rendering would hide some of it."""
    if len(text) > LONGEST:
        return None
    safe = nh3.clean(PARSER.render(text), tags=TAGS, attributes={"li": {"value"}}, link_rel=None)
    shown = html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r'<li value="(\d+)">', r"\1", safe)))
    return safe.strip() if letters(shown) == letters(text) else None


def letters(text):
    return "".join(filter(str.isalnum, text))


def turns(text):
    """A prompt or a response, from JSON, as [{"role", "text", "html"}]. The role of a plain string is ""; html is None for a
    text that can only be shown as it was written."""
    value = json.loads(text)
    value = hh_messages(value) or value
    messages = [{"role": "", "content": value}] if isinstance(value, str) else value
    shown = [(message["role"], message_text(message).strip()) for message in messages]
    return [{"role": role, "text": words, "html": rendered(words)} for role, words in shown]


def words_of(turns):
    """The words and signs of some turns in order, each with the white space after it."""
    return re.findall(r"\s+|\w+\s*|[^\w\s]\s*", "\n\n".join(turn["text"] for turn in turns))


def nearly_equal(a, b):
    """Whether two responses share most of their words, however these are ordered."""
    a, b = words_of(a), words_of(b)
    return max(len(a), len(b)) <= MOST_WORDS and difflib.SequenceMatcher(None, a, b, False).quick_ratio() >= NEARLY


def difference(a, b):
    """[[text, differs], …] for each of two responses, or None where they are too long to compare."""
    a, b = words_of(a), words_of(b)
    if max(len(a), len(b)) > MOST_WORDS:
        return None
    sides = [], []
    for kind, *spans in difflib.SequenceMatcher(None, a, b, False).get_opcodes():
        changed = ["".join(words[start:end]) for words, (start, end) in zip((a, b), (spans[:2], spans[2:]))]
        end = os.path.commonprefix([text[:len(text.rstrip()) - len(text) - 1:-1] for text in changed])[::-1]  # white space
        for side, text in zip(sides, changed):
            parts = (text[:len(text) - len(end)], kind != "equal"), (end, False)
            side += [[part, differs] for part, differs in parts if part]
    return sides
