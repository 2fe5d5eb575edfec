"""Formulas are drawn, and no text gets anything into the page but characters and MathML."""

from html import parser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mathv2_jax.data import formulas

FRAME = {"div", "br", "code"}


class Page(parser.HTMLParser):
    """What a browser makes of HTML: its elements, their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.attributes, self.text = [], [], {}, ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes |= attrs
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        raise AssertionError(data)

    handle_decl = handle_pi = unknown_decl = handle_comment


def page(text):
    """The page of a text; it holds nothing that is not listed."""
    found = Page(formulas.rendered(text))
    assert set(found.elements) <= formulas.ELEMENTS | FRAME
    assert set(found.attributes) <= formulas.ATTRIBUTES | {"style"}
    assert found.attributes["style"] == "line-height:1.5"  # the frame's own
    return found


def test_formulas_are_drawn_and_everything_else_is_escaped():
    text = "Show that $a < b$ & \\[ \\frac{1}{2} \\ge 0 \\] holds.\n<b>$\\notacommand{$"
    found = page(text)
    assert found.elements.count("math") == 2 and "mfrac" in found.elements
    assert found.attributes["display"] == "block" and "br" in found.elements
    assert found.text == "Show that a<b & 12≥0 holds.<b>$\\notacommand{$"


@pytest.mark.parametrize(
    "formula",
    [
        r"\text{</div><script>alert(1)</script>}",
        r"\text{</mtext></math><img src=x onerror=alert(1)>}",
        r"\textbf{<img src=x onerror=alert(1)>}",
        r"\mbox{<style>*{display:none}</style>}",
        r"\text{<!-- }",
        r"\text{&#60;script&#62;alert(1)&#x3C;/script>}",
        r"\text{&lt;script&gt;alert(1)&lt;/script&gt;}",
        r"\href{javascript:alert(1)}{x}",
        r"\style{background:url(http://example.org)}{x}",
        r"\class{x}{y} \color{red;background:url(x)}z",
        r'\color{"onload="alert(1)}x',
        r"\frac{<script>}{\text{</math>",
        r"</math><script>alert(1)</script>",
    ],
)
def test_a_formula_brings_no_element_link_style_or_script_of_its_own(formula):
    for left, right in (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        page(f"Before {left}{formula}{right} after.")


def test_what_a_formula_says_in_words_is_shown_as_it_stands():
    assert page(r"$\text{</div><script>a & b}$").text == "</div><script>a & b".replace(" ", "\xa0")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_whatever_stands_in_a_text_of_a_formula_stays_text(text):
    page(rf"\(\text{{{text}}}\)")
    page(rf"\[\href{{{text}}}{{\mathrm{{{text}}}}}\]")


@given(st.lists(st.sampled_from([*r"\{}$<>&;/=x", "text", "script", "href", "&#60;", '"', "\n"])))
def test_markup_in_pieces_stays_text(pieces):
    page(f"$${''.join(pieces)}$$")
