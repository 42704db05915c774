"""How the labelling page shows a text: as Markdown, as it was written, or as the difference of two responses.

    turns(text)               a prompt or response, from its JSON, as [{"role", "text", "html"}]
    difference(a, b)          which words of two responses differ, side by side

Responses come from models and may hold anything. markdown-it-py renders them with raw HTML switched off, nh3 removes every
tag and attribute that is not listed here, and links and images stay as they are written: nothing can be clicked, loaded or
run. If rendering would hide a letter or a backslash, or change what looks like code or arithmetic, the page shows the text
as it was written and says so.

The paper and the official code ask nobody. Needs tools/requirements.txt.
"""

import difflib
import functools
import html
import json
import os
import re
import unicodedata

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
    """A text as HTML that is safe to show, or None if the rendering would hide or change some of it."""
    if len(text) > LONGEST:
        return None
    tokens = PARSER.parse(text)
    if any(token.type == "inline" and changes(token) for token in tokens):
        return None
    made = PARSER.renderer.render(tokens, PARSER.options, {})
    safe = nh3.clean(made, tags=TAGS, attributes={"li": {"value"}}, link_rel=None)
    shown = html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r'<li value="(\d+)">', r"\1", safe)))
    return safe.strip() if kept(shown) == kept(text) else None


def kept(text):
    """The signs that every rendering has to keep."""
    return "".join(sign for sign in text if sign.isalnum() or sign == "\\")


def changes(inline):
    """Whether a paragraph is code or arithmetic that Markdown takes for emphasis, as in 5*3*2 and __init__, or loses the
    indentation of a line. inline: its token."""
    if re.search(r"\n( {4}| *\t)", inline.content):
        return True
    before, marked = " ", False  # the last sign that is shown; whether marks of emphasis came after it
    for token in inline.children:
        if token.type.endswith(("_open", "_close")):
            if token.markup == "__":
                return True
            marked = True
        elif content := token.content if token.type == "text" else " ":
            if marked and in_word(before) and in_word(content[0]):
                return True
            before, marked = content[-1], False
    return False


def in_word(sign):
    """Whether emphasis beside this sign is within a word. Scripts such as Chinese put no spaces between words."""
    return sign.isalnum() and unicodedata.category(sign) not in ("Lo", "Lm")


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
