import pytest
from hypothesis import given
from hypothesis import strategies as st

from mathv2_jax.text.chat_template import ChatTemplate, Piece, pattern_of
from mathv2_jax.text.tokenizer import Message

CONTROL = ["<think>", "</think>", "<user>"]
USER = Message("user", "x")


def rendered(source: str, *messages: Message, think: bool = False) -> list[Piece]:
    template = ChatTemplate(source, {"bos_token": "<s>"}, CONTROL)
    return template.render(messages, open_assistant=True, think=think)


def test_contents_are_told_from_what_the_template_writes():
    source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}!"
    assert rendered(source, USER, Message("assistant", "[user] ", "hm")) == [
        Piece("<s>[user] "),
        Piece("x", 0),
        Piece("[assistant] "),
        Piece("[user] ", 1),
        Piece("!"),
    ]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_content_that_looks_like_a_mark_is_a_content(text):
    for content in (text, f"\ue0000\ue001{text}", f"{text}</think>"):
        assert rendered("a{{ messages[0].content }}b", Message("user", content)) == [
            Piece("a"),
            Piece(content, 0),
            Piece("b"),
        ]


def test_a_content_may_be_stripped():
    source = "{{ messages[0].content|trim }},{{ messages[1].content.lstrip('\\n') }}"
    assert rendered(source, Message("user", "  </think> "), Message("user", "\n \n")) == [
        Piece("</think>", 0),
        Piece(","),
        Piece(" \n", 1),
    ]


def test_a_content_may_be_asked_whether_it_is_empty():
    source = (
        "{% for m in messages %}{% if m.content %}{{ m.content }}{% else %}-{% endif %}{% endfor %}"
    )
    assert rendered(source, USER, Message("user", "")) == [Piece("x", 0), Piece("-")]


def test_the_template_does_not_see_a_control_token_in_a_content():
    source = (
        "{% set c = messages[0].content %}{{ c.split('</think>')[-1] if '</think>' in c else c }}"
    )
    assert rendered(source, Message("user", "a</think>b")) == [Piece("a</think>b", 0)]


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content|upper }}",
        "{{ messages[0].content|replace('se', 'a') }}",
        "{{ messages[0].content.split('e')[0] }}",
        "{{ messages[0].content|tojson }}",
        "{{ ('' + messages[0].content)|trim }}",
        "{{ messages[0].content }}{% if 'e' in messages[0].content %}!{% endif %}",
    ],
)
def test_a_template_that_changes_or_tests_a_content_is_refused(source):
    with pytest.raises(ValueError, match="changes or tests what messages hold"):
        rendered(source, Message("user", 'se"ven '))


def test_a_template_that_leaves_out_a_message_is_refused():
    with pytest.raises(ValueError, match="leaves out message 1 .*'assistant'"):
        rendered("{{ messages[0].content }}", USER, Message("assistant", "y"))


def test_thinking_is_passed_on():
    source = "{{ messages[0].reasoning_content }}{{ messages[0].content }}{{ thinking }}"
    source += "{{ enable_thinking }}{{ add_generation_prompt }}{{ tools }}"
    assert rendered(source, Message("assistant", "y", "so"), think=True) == [
        Piece("so", 0, is_thinking=True),
        Piece("y", 0),
        Piece("TrueTrueTrueNone"),
    ]


def test_it_has_the_helpers_of_transformers():
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}"
    source += "{% endfor %}\n  {%- if true %}\n{{ {'a': '<ü>'}|tojson(indent=1) }}\n{% endif %}"
    assert rendered(source, USER) == [Piece("x", 0), Piece('{\n "a": "<ü>"\n}\n')]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses roles .*roles must alternate"),
        ("{{ strftime_now('%Y') }}", "write a fixed date"),
        ("{{ messages[0].nothing.more }}", "refuses roles"),
        ("{{ messages[0] + 1 }}", "refuses roles"),
        ("{{ messages.append(1) }}", "refuses roles"),
        ("{{ ''.__class__.__mro__ }}", "refuses roles"),
        ("{{ messages[0].content._book }}", "leaves out message 0"),
        ("{% include 'x' %}", "refuses roles"),
        ("{{ 1 / 0 }}", "refuses roles .*ZeroDivisionError"),
        ("{% for i in range(1000000) %}{% endfor %}", "refuses roles .*OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses roles .*RecursionError"),
        ("{{ 'x'.index('y') }}", "chat template refuses roles .*ValueError"),
        ("{{ 'x' * 10 ** 18 }}", "refuses roles .*(MemoryError|OverflowError)"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "not valid Jinja"),
        ("{% if %}", "not valid Jinja"),
        ("\ue000", "U\\+E000"),
    ],
)
def test_a_template_that_fails_is_one_clear_error(source, message):
    with pytest.raises(ValueError, match=message):
        rendered(source, USER)


def test_the_leftmost_and_there_the_longest_spelling_is_found():
    assert pattern_of(["ab", "abc", "c"]).split("xabcab") == ["x", "abc", "", "ab", ""]
    assert pattern_of([]).split("x") == ["x"]
