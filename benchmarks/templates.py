"""Chat templates of today's open models by kinds of conversations: is the prompt that is trained the one of inference?

    python benchmarks/templates.py                       the table, into results/templates.md
    python benchmarks/templates.py FAMILY [KIND]      what a template makes of a conversation

Each template is written here from the model's token format: it prints the same tokens, spaces and newlines in the same
order, drops what the model's own template drops and refuses what that refuses. The prose (default system messages, how to
call a tool, error texts) is ours and short. Contents are strings: images and lists of content blocks are left out.

A cell is right if the tokens of the prompt are those that the tokenizer makes of the template's prompt for inference, and
the response says all that its message does and ends in exactly one end. Otherwise the row has to be refused.
"""

import functools
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jinja2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime.errors import DataError, one_line  # noqa: E402
from runtime.rendering import Renderer  # noqa: E402


@dataclass(frozen=True)
class Family:
    """name, template: the chat template.  special: tokens with special=True.  added: added tokens that are not special.
    eos, bos: of the tokenizer.  add_bos: whether the tokenizer puts the BOS before every text.
    ends: the strings that end a reply at inference.  lstrip, rstrip: tokens that swallow the whitespace on that side."""
    name: str
    template: str
    special: tuple
    eos: str
    bos: str | None
    ends: tuple
    added: tuple = ()
    add_bos: bool = False
    lstrip: tuple = ()
    rstrip: tuple = ()


def compact(template):
    """The template without its line breaks and indentation, which are there for the reader only."""
    lines = [line.strip() for line in template.splitlines()]
    return "".join(line if line.endswith("}") else line + " " for line in lines if line)  # a tag may span lines


# ----------------------------------------------------------------------------------------------------------------------
# Llama

# The system header is always there. With tools, the first message after it is taken for the user's and gets their schemas.
LLAMA_3_1 = compact(r"""
{% set date = date_string if date_string is defined else strftime_now('%d %b %Y') %}
{% set given = messages[0].role == 'system' %}
{% set turns = messages[1:] if given else messages %}
{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' + ('Environment: ipython\n' if tools is not none else '') }}
{{ 'Cutting Knowledge Date: December 2023\nToday Date: ' + date + '\n\n' }}
{{ (messages[0].content | trim if given else '') + '<|eot_id|>' }}
{% if tools is not none %}
    {% if not turns %}{{ raise_exception('Tools need a first user message to stand in.') }}{% endif %}
    {{ '<|start_header_id|>user<|end_header_id|>\n\nAnswer with a JSON call of one of these functions, in the form ' }}
    {{ '{"name": function name, "parameters": dictionary of arguments}.\n\n' }}
    {% for tool in tools %}{{ tool | tojson(indent=4) + '\n\n' }}{% endfor %}
    {{ turns[0].content | trim + '<|eot_id|>' }}
    {% set turns = turns[1:] %}
{% endif %}
{% for message in turns %}
    {% if 'tool_calls' in message %}
        {% if message.tool_calls | length != 1 %}{{ raise_exception('One tool call a message, no more.') }}{% endif %}
        {% set call = message.tool_calls[0].function %}
        {{ '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
        {{ call.arguments | tojson + '}<|eot_id|>' }}
    {% elif message.role in ['tool', 'ipython'] %}
        {{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + message.content | tojson + '<|eot_id|>' }}
    {% else %}
        {{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
    {% endif %}
{% endfor %}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt else '' }}
""")


# ----------------------------------------------------------------------------------------------------------------------
# ChatML and Qwen

CHATML = compact(r"""
{% for message in messages %}
    {{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{% endfor %}
{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}
""")

QWEN_TOOLS = r"""
{{ '# Tools\n\nYou may call functions. Their signatures stand in <tools></tools>:\n<tools>' }}
{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}
{{ '\n</tools>\n\nWrite each call as JSON in <tool_call></tool_call>:\n<tool_call>\n' }}
{{ '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
"""
# Consecutive tool results share one user turn.
QWEN_RESULT = r"""
{{ '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' else '' }}
{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{{ '<|im_end|>\n' if loop.last or messages[loop.index0 + 1].role != 'tool' else '' }}
"""

QWEN_2_5 = compact(r"""
{% set given = messages[0].role == 'system' %}
{{ '<|im_start|>system\n' + (messages[0].content if given else 'You are Qwen, a helpful assistant.') }}
{% if tools %}{{ '\n\n' }}""" + QWEN_TOOLS + r"""{% else %}{{ '<|im_end|>\n' }}{% endif %}
{% for message in messages %}
    {% if message.role == 'user' or (message.role == 'system' and not loop.first)
          or (message.role == 'assistant' and not message.tool_calls) %}
        {{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {% elif message.role == 'assistant' %}
        {{ '<|im_start|>assistant' + ('\n' + message.content if message.content else '') }}
        {% for call in message.tool_calls %}
            {% set call = call.function or call %}
            {{ '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' + call.arguments | tojson + '}\n</tool_call>' }}
        {% endfor %}
        {{ '<|im_end|>\n' }}
    {% elif message.role == 'tool' %}
""" + QWEN_RESULT + r"""
    {% endif %}
{% endfor %}
{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}
""")

# Reasoning is kept after the last query, the last user message that is not a wrapped tool result. There, the conversation's
# last turn has a think block even if nothing was thought, and an earlier one has it only if something was.
QWEN_3 = compact(r"""
{% if tools %}
    {{ '<|im_start|>system\n' + (messages[0].content + '\n\n' if messages[0].role == 'system' else '') }}
""" + QWEN_TOOLS + r"""
{% elif messages[0].role == 'system' %}
    {{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{% endif %}
{% set last = namespace(query=messages | length - 1, searching=true) %}
{% for message in messages[::-1] %}
    {% if last.searching and message.role == 'user' and message.content is string
          and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {% set last.query = loop.revindex0 %}{% set last.searching = false %}
    {% endif %}
{% endfor %}
{% for message in messages %}
    {% if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {% elif message.role == 'assistant' %}
        {% set content = message.content if message.content is string else '' %}
        {% set thought = '' %}
        {% if message.reasoning_content is string %}
            {% set thought = message.reasoning_content %}
        {% elif '</think>' in content %}
            {% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {% set content = content.split('</think>')[-1].lstrip('\n') %}
        {% endif %}
        {% if loop.index0 > last.query and (loop.last or thought) %}
            {{ '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {% else %}
            {{ '<|im_start|>assistant\n' + content }}
        {% endif %}
        {% for call in message.tool_calls or [] %}
            {{ '\n' if content or not loop.first else '' }}
            {% set call = call.function or call %}
            {{ '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{ (call.arguments if call.arguments is string else call.arguments | tojson) + '}\n</tool_call>' }}
        {% endfor %}
        {{ '<|im_end|>\n' }}
    {% elif message.role == 'tool' %}
""" + QWEN_RESULT + r"""
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
    {{ '<|im_start|>assistant\n' + ('<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false
                                    else '') }}
{% endif %}
""")


# ----------------------------------------------------------------------------------------------------------------------
# Gemma: tools and reasoning are dropped

GEMMA_TURNS = r"""
{% for message in turns %}
    {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate: user, assistant, user, assistant.') }}
    {% endif %}
    {{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
    {{ (prefix if loop.first else '') + message.content | trim + '<end_of_turn>\n' }}
{% endfor %}
{{ '<start_of_turn>model\n' if add_generation_prompt else '' }}
"""
GEMMA_2 = compact(r"""
{{ bos_token }}
{% if messages[0].role == 'system' %}{{ raise_exception('A system message cannot be used here.') }}{% endif %}
{% set turns = messages %}{% set prefix = '' %}
""" + GEMMA_TURNS)
GEMMA_3 = compact(r"""
{{ bos_token }}
{% set given = messages[0].role == 'system' %}
{% set turns = messages[1:] if given else messages %}
{% set prefix = messages[0].content + '\n\n' if given else '' %}
""" + GEMMA_TURNS)


# ----------------------------------------------------------------------------------------------------------------------
# Mistral: no generation prompt, because a reply follows [/INST] directly

# The system text stands in a user message only if that ends the conversation: a conversation with its reply has none.
# Tools stand before the last user message, and their strings are not escaped.
MISTRAL_V0_3 = compact(r"""
{% set given = messages[0].role == 'system' %}
{% set turns = messages[1:] if given else messages %}
{% set users = turns | selectattr('role', 'equalto', 'user') | list %}
{% set count = namespace(n=0) %}
{% for message in turns %}
    {% set calls = message.tool_calls is defined and message.tool_calls is not none %}
    {% if message.role not in ['tool', 'tool_results'] and not calls %}
        {% if (message.role == 'user') != (count.n % 2 == 0) %}
            {{ raise_exception('Roles must alternate after the system message: user, assistant, user, assistant.') }}
        {% endif %}
        {% set count.n = count.n + 1 %}
    {% endif %}
{% endfor %}
{{ bos_token }}
{% for message in turns %}
    {% if message.role == 'user' %}
        {% if tools is not none and message == users[-1] %}
            {{ '[AVAILABLE_TOOLS] [' }}
            {% for tool in tools %}
                {{ '{"type": "function", "function": {' }}
                {% for key, value in tool.function.items() if key != 'return' %}
                    {{ '"' + key + '": ' + ('"' + value + '"' if value is string else value | tojson) }}
                    {{ '' if loop.last else ', ' }}
                {% endfor %}
                {{ '}}' + (']' if loop.last else ', ') }}
            {% endfor %}
            {{ '[/AVAILABLE_TOOLS]' }}
        {% endif %}
        {{ '[INST] ' + (messages[0].content + '\n\n' if loop.last and given else '') + message.content + '[/INST]' }}
    {% elif message.tool_calls is defined and message.tool_calls is not none %}
        {{ '[TOOL_CALLS] [' }}
        {% for call in message.tool_calls %}
            {% if call.id is not defined or call.id | length != 9 %}
                {{ raise_exception('The id of a tool call must have 9 characters.') }}
            {% endif %}
            {{ (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (']' + eos_token if loop.last else ', ') }}
        {% endfor %}
    {% elif message.role == 'assistant' %}
        {{ ' ' + message.content | trim + eos_token }}
    {% elif message.role in ['tool', 'tool_results'] %}
        {% if message.tool_call_id is not defined or message.tool_call_id | length != 9 %}
            {{ raise_exception('The id of a tool call must have 9 characters.') }}
        {% endif %}
        {{ '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {% else %}
        {{ raise_exception('Roles are user and assistant, with a system message at the start only.') }}
    {% endif %}
{% endfor %}
""")

# Small 3 of January 2025: a dated default system message, tools and tool calls are dropped, tool results refused.
MISTRAL_SMALL = compact(r"""
{{ bos_token }}
{% if messages[0].role != 'system' %}
    {{ '[SYSTEM_PROMPT]You are Mistral Small. Today is ' + strftime_now('%Y-%m-%d') + '.[/SYSTEM_PROMPT]' }}
{% endif %}
{% for message in messages %}
    {% if message.role == 'user' %}
        {{ '[INST]' + message.content + '[/INST]' }}
    {% elif message.role == 'system' %}
        {{ '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' }}
    {% elif message.role == 'assistant' %}
        {{ message.content + eos_token }}
    {% else %}
        {{ raise_exception('Roles are user, system and assistant.') }}
    {% endif %}
{% endfor %}
""")

# Every assistant turn keeps its reasoning, past ones too. Tools stand before the first user message. (The model's own
# template also joins consecutive messages of one role.)
MAGISTRAL = compact(r"""
{% set after = {'system': ['user', 'assistant', 'system'], 'user': ['user', 'assistant', 'system'],
                'assistant': ['user', 'assistant', 'tool'], 'tool': ['user', 'assistant', 'tool']} %}
{% set users = namespace(seen=false) %}
{{ bos_token }}
{% if messages[0].role != 'system' %}
    {{ '[SYSTEM_PROMPT]First think, then answer, in this form:[THINK]Your thoughts.[/THINK]Your answer.[/SYSTEM_PROMPT]' }}
{% endif %}
{% for message in messages %}
    {% if message.role not in (['user', 'system'] if loop.first else after[loop.previtem.role]) %}
        {{ raise_exception('A message from ' + message.role + ' may not stand here.') }}
    {% endif %}
    {% if message.role == 'system' %}
        {{ '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' }}
    {% elif message.role == 'user' %}
        {{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' if tools and not users.seen else '' }}
        {% set users.seen = true %}
        {{ '[INST]' + message.content + '[/INST]' }}
    {% elif message.role == 'assistant' %}
        {% set thought = message.get('reasoning_content', message.get('reasoning')) %}
        {% if not (thought or message.content or message.tool_calls) %}
            {{ raise_exception('An assistant message must have content or tool calls.') }}
        {% endif %}
        {{ ('[THINK]' + thought + '[/THINK]' if thought else '') + (message.content or '') }}
        {% for call in message.tool_calls or [] %}
            {% set arguments = call.function.arguments %}
            {{ '[TOOL_CALLS]' + call.function.name + '[ARGS]' }}
            {{ arguments | tojson if arguments is not string else arguments or '{}' }}
        {% endfor %}
        {{ eos_token }}
    {% else %}
        {{ '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
    {% endif %}
{% endfor %}
""")


# ----------------------------------------------------------------------------------------------------------------------
# Phi: tools, tool results and reasoning are dropped

PHI_3 = compact(r"""
{% for message in messages %}
    {% if message.role in ['user', 'assistant'] or (message.role == 'system' and message.content) %}
        {{ {'system': '<|system|>', 'user': '<|user|>', 'assistant': '<|assistant|>'}[message.role] }}
        {{ '\n' + message.content + '<|end|>\n' }}
    {% endif %}
{% endfor %}
{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}
""")

PHI_4 = compact(r"""
{% for message in messages %}
    {% if message.role in ['system', 'user', 'assistant'] %}
        {{ '<|im_start|>' + message.role + '<|im_sep|>' + message.content + '<|im_end|>' }}
    {% endif %}
{% endfor %}
{{ '<|im_start|>assistant<|im_sep|>' if add_generation_prompt else '' }}
""")


# ----------------------------------------------------------------------------------------------------------------------
# DeepSeek: the arguments of a tool call must be a string. The offered tools are dropped, and so is the reasoning of every
# turn, the last one included. An answer after a tool result has no <｜Assistant｜>; a prompt that ends with a result has no
# generation prompt.

DEEPSEEK_CALL = ("'<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name + '\\n```json\\n'"
                 " + call.function.arguments + '\\n```<｜tool▁call▁end｜>'")
DEEPSEEK_ANSWER = r"""
{% if state.is_tool %}
    {{ '<｜tool▁outputs▁end｜>' + message.content + '<｜end▁of▁sentence｜>' }}
    {% set state.is_tool = false %}
{% else %}
    {{ '<｜Assistant｜>' + message.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}
{% endif %}
"""

# System messages are joined. <｜Assistant｜> is printed before the first tool call of a conversation and not before others.
DEEPSEEK_R1 = compact(r"""
{% set state = namespace(called=false, is_tool=false, outputs=false) %}
{{ bos_token + messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') }}
{% for message in messages %}
    {% if message.role == 'user' %}
        {% set state.is_tool = false %}
        {{ '<｜User｜>' + message.content }}
    {% elif message.role == 'assistant' and 'tool_calls' in message %}
        {% set state.is_tool = false %}
        {% for call in message.tool_calls %}
            {{ '\n' if state.called else '<｜Assistant｜>' + ('' if message.content is none else message.content) }}
            {{ '' if state.called else '<｜tool▁calls▁begin｜>' }}
            {{ """ + DEEPSEEK_CALL + r""" }}
            {% set state.called = true %}
        {% endfor %}
        {{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
    {% elif message.role == 'assistant' %}
""" + DEEPSEEK_ANSWER + r"""
    {% elif message.role == 'tool' %}
        {% set state.is_tool = true %}
        {{ ('' if state.outputs else '<｜tool▁outputs▁begin｜>') + '<｜tool▁output▁begin｜>' + message.content }}
        {{ '<｜tool▁output▁end｜>' }}
        {% set state.outputs = true %}
    {% endif %}
{% endfor %}
{{ '<｜tool▁outputs▁end｜>' if state.is_tool else '<｜Assistant｜><think>\n' if add_generation_prompt else '' }}
""")

# The distilled models as first published. The last system message counts. A tool call counts only if the content is none (an
# empty string hides it), and only a second call is followed by the end of the calls.
DEEPSEEK_R1_DISTILL = compact(r"""
{% set state = namespace(called=false, is_tool=false, outputs=false) %}
{{ bos_token + (messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | list)[-1:] | join }}
{% for message in messages %}
    {% if message.role == 'user' %}
        {% set state.is_tool = false %}
        {{ '<｜User｜>' + message.content }}
    {% elif message.role == 'assistant' and message.content is none %}
        {% set state.is_tool = false %}
        {% for call in message.tool_calls %}
            {{ '\n' if state.called else '<｜Assistant｜><｜tool▁calls▁begin｜>' }}
            {{ """ + DEEPSEEK_CALL + r""" }}
            {{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' if state.called else '' }}
            {% set state.called = true %}
        {% endfor %}
    {% elif message.role == 'assistant' %}
""" + DEEPSEEK_ANSWER + r"""
    {% elif message.role == 'tool' %}
        {% set state.is_tool = true %}
        {{ ('\n' if state.outputs else '<｜tool▁outputs▁begin｜>') + '<｜tool▁output▁begin｜>' + message.content }}
        {{ '<｜tool▁output▁end｜>' }}
        {% set state.outputs = true %}
    {% endif %}
{% endfor %}
{{ '<｜tool▁outputs▁end｜>' if state.is_tool else '<｜Assistant｜>' if add_generation_prompt else '' }}
""")


# ----------------------------------------------------------------------------------------------------------------------
# gpt-oss (harmony)

# A system message goes into the developer message; the system message is the template's own. Reasoning is shown in the last
# turn, and before a tool call that no later answer follows. Types of parameters: unions are left out.
GPT_OSS = compact(r"""
{% macro type_of(spec) %}
    {% if spec.type == 'array' %}
        {{ (type_of(spec['items']) if spec['items'] else 'any') + '[]' + (' | null' if spec.nullable else '') }}
    {% elif spec.type == 'string' and spec.enum %}
        {{ '"' + spec.enum | join('" | "') + '"' }}
    {% elif spec.type == 'string' %}
        {{ 'string' + (' | null' if spec.nullable else '') }}
    {% elif spec.type in ['number', 'integer', 'boolean'] %}
        {{ 'boolean' if spec.type == 'boolean' else 'number' }}
    {% elif spec.type == 'object' and spec.properties %}
        {{ '{\n' }}
        {% for name, inner in spec.properties.items() %}
            {{ name + ('' if name in (spec.required or []) else '?') + ': ' + type_of(inner) + ('' if loop.last else ', ') }}
        {% endfor %}
        {{ '}' }}
    {% else %}
        {{ 'object' if spec.type == 'object' else 'any' }}
    {% endif %}
{% endmacro %}
{% set given = messages[0].role in ['system', 'developer'] %}
{% set turns = messages[1:] if given else messages %}
{{ '<|start|>system<|message|>' + (model_identity if model_identity is defined else 'You are ChatGPT.') }}
{{ '\nKnowledge cutoff: 2024-06\nCurrent date: ' + strftime_now('%Y-%m-%d') + '\n\nReasoning: ' }}
{{ (reasoning_effort if reasoning_effort is defined else 'medium') + '\n\n' }}
{{ '# Valid channels: analysis, commentary, final.' + ('\nCall functions in commentary.' if tools else '') + '<|end|>' }}
{% if tools or (given and messages[0].content) %}
    {{ '<|start|>developer<|message|>' }}
    {{ '# Instructions\n\n' + messages[0].content + '\n\n' if given and messages[0].content else '' }}
    {% if tools %}
        {{ '# Tools\n\n## functions\n\nnamespace functions {\n\n' }}
        {% for tool in tools %}
            {% set parameters = tool.function.parameters %}
            {{ '// ' + tool.function.description + '\ntype ' + tool.function.name + ' = ' }}
            {% if parameters and parameters.properties %}
                {{ '(_: {\n' }}
                {% for name, spec in parameters.properties.items() %}
                    {{ '// ' + spec.description + '\n' if spec.description else '' }}
                    {{ name + ('' if name in (parameters.required or []) else '?') + ': ' + type_of(spec) }}
                    {% if spec.default is defined %}
                        {{ ', // default: ' + (spec.default if spec.enum else spec.default | tojson) }}
                    {% endif %}
                    {{ ',\n' }}
                {% endfor %}
                {{ '}) => any;\n\n' }}
            {% else %}
                {{ '() => any;\n\n' }}
            {% endif %}
        {% endfor %}
        {{ '} // namespace functions' }}
    {% endif %}
    {{ '<|end|>' }}
{% endif %}
{% set last = namespace(call=none) %}
{% for message in turns %}
    {% if message.role == 'assistant' %}
        {% for text in [message.content or '', message.thinking or ''] %}
            {% if '<|channel|>analysis<|message|>' in text or '<|channel|>final<|message|>' in text %}
                {{ raise_exception('Channels are written here: give the reasoning as thinking, the answer as content.') }}
            {% endif %}
        {% endfor %}
        {% if 'tool_calls' in message %}
            {% set answered = turns[loop.index:] | selectattr('role', 'equalto', 'assistant')
                              | rejectattr('tool_calls', 'defined') | list %}
            {% if message.content and message.thinking %}
                {{ raise_exception('A tool call may have content or thinking, not both.') }}
            {% elif (message.content or message.thinking) and not answered %}
                {{ '<|start|>assistant<|channel|>analysis<|message|>' + (message.content or message.thinking) + '<|end|>' }}
            {% endif %}
            {% set call = message.tool_calls[0].function or message.tool_calls[0] %}
            {{ '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary ' + (call.content_type or 'json') }}
            {{ '<|message|>' + call.arguments | tojson + '<|call|>' }}
            {% set last.call = call.name %}
        {% elif loop.last and not add_generation_prompt %}
            {% if 'thinking' in message %}
                {{ '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}
            {% endif %}
            {{ '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}
        {% else %}
            {{ '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
            {% set last.call = none %}
        {% endif %}
    {% elif message.role == 'tool' %}
        {% if last.call is none %}{{ raise_exception('A tool result must follow a tool call.') }}{% endif %}
        {{ '<|start|>functions.' + last.call + ' to=assistant<|channel|>commentary<|message|>' + message.content | tojson }}
        {{ '<|end|>' }}
    {% elif message.role == 'user' %}
        {{ '<|start|>user<|message|>' + message.content + '<|end|>' }}
    {% endif %}
{% endfor %}
{{ '<|start|>assistant' if add_generation_prompt else '' }}
""")


# ----------------------------------------------------------------------------------------------------------------------
# Zephyr: the role markers are plain text, not tokens

ZEPHYR = compact(r"""
{% for message in messages %}
    {% if message.role in ['system', 'user', 'assistant'] %}
        {{ '<|' + message.role + '|>\n' + message.content + eos_token + '\n' }}
    {% endif %}
    {{ '<|assistant|>\n' if loop.last and add_generation_prompt else '' }}
{% endfor %}
""")


# ----------------------------------------------------------------------------------------------------------------------
# The families

# The tokens that text can meet: vision tokens, padding and reserved ones are left out.
PHI_3_TURNS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PHI_4_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>")
MISTRAL_TOKENS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
                  "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
TEKKEN_TOKENS = (*MISTRAL_TOKENS, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")
GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
DEEPSEEK_ENDS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
DEEPSEEK_TURNS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
DEEPSEEK_TOOLS = tuple(f"<｜tool▁{name}｜>" for name in (
    "calls▁begin", "calls▁end", "call▁begin", "call▁end", "outputs▁begin", "outputs▁end", "output▁begin", "output▁end",
    "sep"))
DEEPSEEK = {"special": DEEPSEEK_ENDS, "bos": DEEPSEEK_ENDS[0], "eos": DEEPSEEK_ENDS[1], "ends": DEEPSEEK_ENDS[1:],
            "add_bos": True}

FAMILIES = {family.name: family for family in (
    Family("llama-3.1", LLAMA_3_1, ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                                    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
           eos="<|eot_id|>", bos="<|begin_of_text|>", ends=("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"), add_bos=True),
    Family("qwen-2.5", QWEN_2_5, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), eos="<|im_end|>", bos=None,
           ends=("<|im_end|>", "<|endoftext|>"), added=("<tool_call>", "</tool_call>")),
    Family("qwen-3", QWEN_3, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), eos="<|im_end|>", bos=None,
           ends=("<|im_end|>", "<|endoftext|>"),
           added=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")),
    Family("gemma-2", GEMMA_2, GEMMA_TOKENS, eos="<eos>", bos="<bos>", ends=("<end_of_turn>", "<eos>"), add_bos=True),
    Family("gemma-3", GEMMA_3, GEMMA_TOKENS, eos="<eos>", bos="<bos>", ends=("<end_of_turn>", "<eos>"), add_bos=True),
    Family("mistral-v0.3", MISTRAL_V0_3, MISTRAL_TOKENS, eos="</s>", bos="<s>", ends=("</s>",), add_bos=True),
    Family("mistral-small", MISTRAL_SMALL, TEKKEN_TOKENS, eos="</s>", bos="<s>", ends=("</s>",), add_bos=True),
    Family("magistral", MAGISTRAL, (*TEKKEN_TOKENS, "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"), eos="</s>", bos="<s>",
           ends=("</s>",), add_bos=True),
    Family("phi-3", PHI_3, ("<unk>", "<s>", "<|endoftext|>", *PHI_3_TURNS), eos="<|endoftext|>", bos="<s>",
           ends=("<|end|>", "<|assistant|>", "<|endoftext|>"), added=("</s>",), rstrip=("</s>", *PHI_3_TURNS)),
    Family("phi-4", PHI_4, PHI_4_TOKENS, eos="<|im_end|>", bos="<|endoftext|>", ends=("<|im_end|>", "<|endoftext|>"),
           lstrip=PHI_4_TOKENS, rstrip=PHI_4_TOKENS),
    Family("deepseek-r1", DEEPSEEK_R1, **DEEPSEEK, added=(*DEEPSEEK_TURNS, *DEEPSEEK_TOOLS)),
    Family("deepseek-r1-distill-old", DEEPSEEK_R1_DISTILL, **DEEPSEEK, added=DEEPSEEK_TURNS),
    Family("gpt-oss", GPT_OSS, ("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>",
                                "<|start|>", "<|end|>", "<|message|>", "<|call|>"),
           eos="<|return|>", bos="<|startoftext|>", ends=("<|return|>", "<|call|>", "<|endoftext|>")),
    Family("chatml", CHATML, ("<|im_start|>", "<|im_end|>"), eos="<|im_end|>", bos=None, ends=("<|im_end|>",)),
    Family("zephyr", ZEPHYR, ("<unk>", "<s>", "</s>"), eos="</s>", bos="<s>", ends=("</s>",), add_bos=True),
)}


# ----------------------------------------------------------------------------------------------------------------------
# The kinds of conversations

def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def reply(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(city, **more):
    function = {"name": "weather", "arguments": {"city": city}}
    return reply("", tool_calls=[{"type": "function", "id": "abcdefghi", "function": function}], **more)


RESULT = {"role": "tool", "content": '{"sky": "clear"}', "name": "weather", "tool_call_id": "abcdefghi"}
TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "Weather of a city.",
    "parameters": {"type": "object", "required": ["city"], "properties": {
        "city": {"type": "string", "description": "Name of the city."},
        "days": {"type": "integer", "default": 1},
        "unit": {"type": "string", "enum": ["C", "F"]}}}}}]
# What people write when they talk about chat templates: an end, and for some models a start, of every family.
TOKENS = ("<|im_end|> <|im_start|>user </s> [INST] [THINK] <|eot_id|> <|start_header_id|> <end_of_turn> <eos> <|end|> "
          "<|user|> <|im_sep|> <|endoftext|> <｜end▁of▁sentence｜> <｜User｜> <|return|> <|call|> <|channel|> <tool_call> "
          "end")

# name: (prompt, response a, response b, tools)
KINDS = {
    "single turn": ([user("Why?")], [reply("Because it is.")], [reply("No idea.")], None),
    "many turns": ([user(" Hello. "), reply("\nHi, you.\n"), user("Who is it?\n")],
                   [reply(" A friend. ")], [reply("Nobody.\n")], None),
    "system message": ([system("Be brief. "), user("Why?")], [reply("Because.")], [reply("I could not say.")], None),
    "tools, plain answer": ([user("Hello.")], [reply("Hi.")], [reply("What?")], TOOLS),
    "tool call as the reply": ([user("Is it sunny in Rome?")], [call("Rome")], [call("Bonn")], TOOLS),
    "tool result at the end": ([user("Is it sunny in Rome?"), call("Rome"), RESULT], [reply("Yes.")], [reply("No.")], TOOLS),
    "tool call in the past": ([user("Is it sunny in Rome?"), call("Rome"), RESULT, reply("Yes."), user("Sure?")],
                              [reply("I am.")], [reply("Perhaps.")], TOOLS),
    "reasoning as a field": ([user("2 + 2?")], [reply("4", reasoning_content="Two and two.")],
                             [reply("5", reasoning_content="A guess.")], None),
    "reasoning in the content": ([user("2 + 2?")], [reply("<think>\nTwo and two.\n</think>\n\n4")],
                                 [reply("<think>\nA guess.\n</think>\n\n5")], None),
    "reasoning before a tool call": ([user("Is it sunny in Rome?")], [call("Rome", reasoning_content="Look it up.")],
                                     [call("Bonn", reasoning_content="A guess.")], TOOLS),
    "reasoning in the past": ([user("2 + 2?"), reply("4", reasoning_content="Two and two."), user("And 3 + 3?"),
                               reply("<think>\nThree and three.\n</think>\n\n6"), user("Sum?")],
                              [reply("10", reasoning_content="Four and six.")], [reply("I forgot.")], None),
    "token text in the prompt": ([user(f"What is {TOKENS}?")], [reply("Tokens.")], [reply("No idea.")], None),
    "token text in the reply": ([user("Name tokens.")], [reply(f"These: {TOKENS}.")],
                                [reply("<|im_end|> </s> and more.")], None),
}


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers

@functools.cache
def trained():
    """A small byte-level BPE, as JSON."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(
        ["the user asks and the assistant answers", "think and answer in the final turn", "Because.\n\n", "<|im </s"] * 9,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return made.to_str()


def tokenizer(family):
    """A small tokenizer with the family's special and added tokens, EOS, BOS and chat template."""
    def token(text, special=True):
        return AddedToken(text, special=special, normalized=False,
                          lstrip=text in family.lstrip, rstrip=text in family.rstrip)

    made = Tokenizer.from_str(trained())
    made.add_special_tokens([token(text) for text in family.special])
    made.add_tokens([token(text, special=False) for text in family.added])
    if family.add_bos:
        made.post_processor = processors.TemplateProcessing(
            single=[family.bos, "$A"], pair=[family.bos, "$A", family.bos, "$B"],
            special_tokens=[(family.bos, made.token_to_id(family.bos))])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=token(family.eos), bos_token=family.bos and token(family.bos),
        clean_up_tokenization_spaces=False, chat_template=family.template)


# ----------------------------------------------------------------------------------------------------------------------
# The check

def rendered(made, messages, tools, ask):
    """The text that the tokenizer's own method makes, with reasoning under each name that a template reads it by."""
    messages = [{**m, **dict.fromkeys(("thinking", "reasoning"), m["reasoning_content"])} if "reasoning_content" in m else m
                for m in messages]
    return made.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)


def outcome(family, kind):
    """What becomes of a pair: "right", with what was counted, "refused", with the reason, or "WRONG", with what is wrong."""
    prompt, *responses, tools = KINDS[kind]
    made = tokenizer(family)
    renderer = Renderer(made, 4000, 8000)
    given = [{"role": "tools", "content": json.dumps(tools)}] * bool(tools) + prompt
    try:
        prompt_ids, response_ids, notes = renderer.render([(given, responses)])[0]
    except DataError as error:
        return f"refused: {error}"
    except (jinja2.TemplateError, TypeError) as error:  # TypeError: a template adds something to a string that is none
        return f"refused: the template says: {one_line(error, 100)}"
    wrong = wrong_prompt(family, made, rendered(made, prompt, tools, ask=True), prompt_ids, "token text" in kind)
    for response, ids in zip(responses, response_ids):
        wrong = wrong or wrong_response(family, made, prompt_ids, response, ids)
    return f"WRONG: {wrong}" if wrong else "; ".join(["right", *notes])


def wrong_prompt(family, made, text, ids, has_token_text):
    """What is wrong with a prompt's tokens, or None. text: the prompt at inference."""
    expected = made(text, add_special_tokens=False).input_ids
    bos = [made.bos_token_id] if family.add_bos else []
    if expected[:1] != bos:
        expected = bos + expected
    if has_token_text:  # the tokenizer makes tokens of it, and some swallow the white space beside them; we must not
        tokens = ids.count(made.convert_tokens_to_ids(family.ends[0]))
        turns = text.replace(TOKENS, "").count(family.ends[0])
        same = "".join(made.decode(ids).split()) == "".join((made.decode(bos) + text.removeprefix(made.decode(bos))).split())
        return None if same and tokens == turns else f"the prompt is {made.decode(ids)!r}"
    return None if ids == expected else f"the prompt is {made.decode(ids)!r}, at inference {made.decode(expected)!r}"


def wrong_response(family, made, prompt_ids, messages, ids):
    """What is wrong with a response's tokens, or None."""
    ends, text = set(map(made.convert_tokens_to_ids, family.ends)), made.decode(ids)
    if sum(id in ends for id in ids) != 1 or ids[-1] not in ends:
        return f"the response {text!r} does not end in exactly one end"
    after = made.decode(prompt_ids) + text  # what the prompt begins, the response need not repeat
    said = [part for m in messages for part in (m["content"].strip(), m.get("reasoning_content", ""))]
    calls = [call["function"] for m in messages for call in m.get("tool_calls", ())]
    said += [value for call in calls for value in (call["name"], *call["arguments"].values())]
    after = "".join(after[len(after) - len(text) - len("<think>\n"):].split())
    missing = [part for part in said if "".join(part.split()) not in after]
    return f"the response {text!r} lacks {missing[0]!r}" if missing else None


def main(only_family=None, only_kind=None):
    if only_family:
        for kind in [only_kind] if only_kind else KINDS:
            show(FAMILIES[only_family], kind)
        return
    (ROOT / "benchmarks" / "results" / "templates.md").write_text(table(), encoding="utf-8")


def table():
    """The table of all cells, as Markdown."""
    def verdict(cell):
        return re.match(r"\w+", cell)[0]

    cells = {(family, kind): outcome(FAMILIES[family], kind) for family in FAMILIES for kind in KINDS}
    reasons = sorted({cell for cell in cells.values() if cell != "right"})
    marks = {"right": "right"} | {cell: f"{verdict(cell)} {n}" for n, cell in enumerate(reasons, 1)}
    count = Counter(map(verdict, cells.values()))
    lines = ["# Chat templates", "",
             "Made by `python benchmarks/templates.py`, and compared with this file by the tests.", "",
             "Right: the tokens of the trained prompt are those of the prompt at inference, and the response says",
             "all that its message does and ends in exactly one end. Otherwise the row is refused, with a line below",
             "the table. The templates are written for it, and do what the models' own templates do.", "",
             f"{len(cells)} cells: {count['right']} right, {count['refused']} refused, {count['WRONG']} WRONG.", "",
             "| | " + " | ".join(FAMILIES) + " |", "| --- |" + " --- |" * len(FAMILIES)]
    lines += [f"| {kind} | " + " | ".join(marks[cells[family, kind]] for family in FAMILIES) + " |" for kind in KINDS]
    return "\n".join([*lines, "", *(f"{n}. {cell}" for n, cell in enumerate(reasons, 1))]) + "\n"


def show(family, kind):
    """Print what the template itself makes of a conversation, and what we make of it."""
    prompt, *responses, tools = KINDS[kind]
    made = tokenizer(family)
    print(f"--- {family.name}: {kind}: {outcome(family, kind)}")
    for messages, ask in ((prompt, True), *((prompt + response, False) for response in responses)):
        try:
            print(f"{rendered(made, messages, tools, ask)!r}")
        except (jinja2.TemplateError, TypeError) as error:  # TypeError: a template adds something to a string that is none
            print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
