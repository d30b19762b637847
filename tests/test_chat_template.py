from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from llm_magic.backends.accelerate.prompt import template_sandbox
from llm_magic.backends.accelerate.prompt.chat_template import TEMPLATE_LIMIT, render
from llm_magic.errors import PromptError

SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%B %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'tool' or 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {% generation %}{{- " " + message["content"] + eos_token}}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}"""
QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
PHI = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\n' + "
    "message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
COMMANDS = """{% macro turn(role, text='') -%}
<{{ role|upper }}>{{ caller() if caller else text|replace('\\n', ' ')|title }}</{{ role|upper }}>
{%- endmacro %}
{% for message in messages if message.content %}
{% if loop.index > 3 %}{% break %}{% endif %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{% set shout %}{{ message.content ~ '!' ~ loop.index }}{% endset %}
{{ turn(message.role, shout) }}
{%- call turn('note') %}{{ '%s-%03d' % (message.role, loop.length) }} {{ '{:>6}|{}'.format(message.role, 1) }}{% endcall %}
{% endfor %}
{{ messages | map(attribute='role') | unique | sort | join(', ') }} {{ ['a', 'b'] + ['c'] }} {{ {'x': 1.5, 'y': none} }}
{{ dict(a=1, b=[2])|tojson(indent=2) }} {{ 7 // 2 }} {{ 2 ** 5 }} {{ 'ab' * 3 }} {{ [1, 2] * 2 }} {{ range(3)|list }}
{{ messages|length }} {{ (messages|first).role[:2] }} {{ 'x'.center(5) }}{{ messages|groupby('role')|length }}
{% for key, value in {'b': 1, 'a': 2}|dictsort %}{{ key }}={{ value }};{% endfor %}
"""
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
PARTS_OR_ERROR = (
    "{% for message in messages %}{{ '<' ~ message.role ~ '>' }}{% for part in message.content %}"
    "{{ part.text + '' }}{% endfor %}{% endfor %}{{ bos_token + 'x' }}"
)
QWEN2_VL = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "qwen2-vl": QWEN2_VL,
    "smollm": SMOLLM,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "qwen3": QWEN3,
    "phi": PHI,
    "commands": COMMANDS,
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": " What is <b>2 + 2</b>? \n"}],
    "turns": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!  "},
        {"role": "user", "content": "naïve 東京 🙂 {{ 7 * 7 }}"},
    ],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}],
    "reasoning": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYo", "reasoning": "hm"},
    ],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    from tests.tiny import save_tokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def ours(tokenizer: Any, template: str, chat: list[dict[str, Any]], **options: Any) -> str:
    start, last = options.pop("add_generation_prompt", False), options.pop("continue_final_message", False)
    return render(
        template,
        chat,
        add_generation_prompt=start,
        continue_final_message=last,
        variables={**tokenizer.special_tokens_map, **options},
    )


def named(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With reasoning by the names that templates know it by: transformers 5.17 leaves that to whoever asks."""
    return [
        message | dict.fromkeys(("thinking", "reasoning_content"), message["reasoning"])
        if "reasoning" in message
        else message
        for message in chat
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"add_generation_prompt": True},
        {},
        {"continue_final_message": True},
        {"add_generation_prompt": True, "enable_thinking": False, "date_string": "1 May 2026"},
        {
            "add_generation_prompt": True,
            "tools": [{"type": "function", "function": {"name": "f", "é": "<&>"}}],
        },
    ],
    ids=["answer", "closed", "continue", "options", "tools"],
)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_same_text_as_transformers(
    tokenizer: PreTrainedTokenizerBase, name: str, chat: str, options: dict[str, Any]
) -> None:
    template, messages = TEMPLATES[name], CHATS[chat]
    told = messages if hasattr(chat_template_utils, "_alias_reasoning_fields") else named(messages)
    try:
        expected = tokenizer.apply_chat_template(told, chat_template=template, tokenize=False, **options)
    except Exception:  # what a template refuses there, it must refuse here
        with pytest.raises(PromptError):
            ours(tokenizer, template, messages, **options)
    else:
        assert ours(tokenizer, template, messages, **options) == expected


@pytest.mark.parametrize(
    "options", [{"add_generation_prompt": True}, {"continue_final_message": True}], ids=str
)
@pytest.mark.parametrize("chat", ["one", "turns", "system"])
@pytest.mark.parametrize("template", [LLAVA, SMOLVLM, PARTS_OR_ERROR], ids=["llava", "smolvlm", "error"])
def test_text_goes_in_parts_to_a_template_that_would_drop_it(
    tokenizer: PreTrainedTokenizerBase, template: str, chat: str, options: dict[str, Any]
) -> None:
    messages = CHATS[chat]
    parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    expected = tokenizer.apply_chat_template(parts, chat_template=template, tokenize=False, **options)
    assert ours(tokenizer, template, messages, **options) == expected
    assert messages[-1]["content"].strip() in expected


def test_the_starters_own_template(starter_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(starter_folder)
    for messages in CHATS.values():
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours(tokenizer, tokenizer.chat_template, messages, add_generation_prompt=True) == expected


def test_messages_are_not_changed() -> None:
    messages = [{"role": "assistant", "content": "a", "thinking": "b"}]
    render(SMOLLM, messages, add_generation_prompt=False, continue_final_message=True, variables={})
    assert messages == [{"role": "assistant", "content": "a", "thinking": "b"}]


def test_a_refusal_is_told_in_the_templates_words() -> None:
    with pytest.raises(PromptError, match="System role not supported"):
        render(GEMMA, CHATS["system"], add_generation_prompt=True, variables={"bos_token": ""})
    with pytest.raises(PromptError) as caught:
        run("{{ raise_exception('\x1b]0;title\x07\nno' ~ 'o' * 1000) }}")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 500


def run(template: str) -> str:
    return render(template, CHATS["turns"], add_generation_prompt=True, variables={"bos_token": "<s>"})


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['time'] }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ dict.__class__ }}",
    "{{ self.__init__ }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ namespace(__class__=1) }}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "{% for f in [1]|map(attribute='__class__') %}{{ f }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ lipsum.__globals__ }}",
    "{{ range.__globals__ }}",
    "{{ (messages|map('length')).gi_frame }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_no_way_out_of_the_sandbox(template: str) -> None:
    with pytest.raises(PromptError):
        run(template)


DOUBLE = "{% set n = namespace(v=START) %}{% for i in range(60) %}{% set n.v = STEP %}{% endfor %}{{ n.v }}"
BOMBS = [
    "{% for i in range(10**9) %}a{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ ([1] * 10**9)|length }}",
    "{{ 10**(10**10) }}",
    "{% set n = namespace(v=7) %}{% for i in range(99) %}{% set n.v = n.v * n.v %}{% endfor %}",
    "{{ 'a'.center(10**9) }}",
    "{{ 'a'|center(10**9) }}",
    "{{ 'a'|center(width=10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ '1'.zfill(10**9) }}",
    "{{ ('\t' * 1000).expandtabs(10**9) }}",
    "{{ ('\t' * 100000).expandtabs(10000) }}",
    "{{ 'a\na'|indent(10**9) }}",
    "{{ ('a\n' * 100000)|indent(10000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%(a)1000000000d' % {'a': 1} }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ '{a:{b}}'.format_map({'a': 1, 'b': 10**9}) }}",
    "{% set s = 'a' * 100000 %}{{ ('{0}' * 100000).format(s) }}",
    "{% set s = 'a' * 100000 %}{{ ('%(a)s' * 100000) % {'a': s} }}",
    "{% set s = 'a' * 100000 %}{{ s.replace('a', s) }}",
    "{% set s = 'a' * 100000 %}{{ s.replace('', s) }}",
    "{% set s = 'a' * 100000 %}{{ s|replace('a', s) }}",
    "{% set s = 'a' * 100000 %}{{ s|replace(old='a', new=s) }}",
    "{% set s = 'a' * 100000 %}{{ s.join(s) }}",
    "{% set s = 'a' * 100000 %}{{ s|join(s) }}",
    "{{ range(99999)|map('string')|list|sum(start=[]) }}",
    "{{ range(99999)|sum(start=[]) }}",
    "{{ 1.5|round(10**9) }}",
    "{{ 1.5|round(10**9, 'floor') }}",
    "{{ messages|tojson(indent=10**8) }}",
    "{{ (1).to_bytes(10**9, 'big') }}",
    "{{ 'a'.translate({97: 'b' * 100000}) }}",
    "{{ strftime_now('%1000000000Y') }}",
    "{% set n = namespace(v=[]) %}{% for i in range(99999) %}{% set n.v = [n.v] %}{% endfor %}{{ n.v }}",
    *(
        DOUBLE.replace("START", start).replace("STEP", step)
        for start, step in [
            ("'ab'", "n.v ~ n.v"),
            ("'ab'", "n.v + n.v"),
            ("'ab'", "n.v * 2"),
            ("'ab'", "'%s%s' % (n.v, n.v)"),
            ("'ab'", "'{0}{0}'.format(n.v)"),
            ("'ab'", "[n.v, n.v]|join"),
            ("'ab'", "n.v.replace('a', 'aba')"),
            ("[1]", "n.v + n.v"),
            ("[1]", "[n.v, n.v]"),
            ("(1,)", "(n.v, n.v)"),
            ("[1]", "{'a': n.v, 'b': n.v}"),
            ("[1]", "dict(a=n.v, b=n.v)"),
        ]
    ),
    "{% set n = namespace(v='ab') %}{% for i in range(60) %}{% set x %}{{ n.v }}{{ n.v }}{% endset %}{% set n.v = x %}{% endfor %}",
    "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}"
    "{% endfor %}{{ n.a == n.b }}",
    "{% set s = 'a' * 4000000 %}{% set n = namespace(v=[]) %}{% for i in range(99999) %}{% set n.v = n.v + [s ~ i] %}{% endfor %}",
    "{% set s = 'a' * 4000000 %}{% set n = namespace(v=[]) %}{% for i in range(99999) %}{% set n.v = n.v + [s[1:]] %}{% endfor %}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
]


@pytest.mark.timeout(60)  # without a stop, these run for hours or until memory is gone
@pytest.mark.parametrize("template", BOMBS)
def test_a_bomb_is_stopped_without_growing(template: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(PromptError):
            run(template)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200 << 20


def test_time_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "TIME_LIMIT_S", 0.0)
    with pytest.raises(PromptError, match="takes longer"):
        run(SMOLLM)


def test_a_long_template_is_not_compiled() -> None:
    with pytest.raises(PromptError, match="too many to run"):
        run("a" * (TEMPLATE_LIMIT + 1))


def test_a_long_conversation_is_no_bomb() -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"{i} " * 5000} for i in range(401)]
    for template in (SMOLLM, MISTRAL, QWEN3, GEMMA):
        text = render(
            template, messages, add_generation_prompt=True, variables={"bos_token": "", "eos_token": ""}
        )
        assert "400 400" in text


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ missing.attribute }}", "{{ 1 / 0 }}", "{{ 'a'|nofilter }}", "{% endfor %}"]
)
def test_a_broken_template_names_the_way_around(template: str) -> None:
    with pytest.raises(PromptError) as caught:
        run(template)
    assert "--no-template" in caught.value.next_step


def test_nothing_to_continue() -> None:
    with pytest.raises(PromptError, match="no message to continue"):
        render(SMOLLM, [], add_generation_prompt=False, continue_final_message=True, variables={})
    with pytest.raises(PromptError, match="cannot continue"):
        render(SMOLLM, CHATS["one"], add_generation_prompt=True, continue_final_message=True, variables={})
