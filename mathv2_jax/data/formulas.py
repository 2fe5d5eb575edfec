"""Texts as HTML that is safe to show: formulas as MathML, everything else escaped.

Whoever wrote a text, a model or a stranger, gets nothing into the page but characters and the
elements of presentation that are listed here.
"""

import html
import re
from xml.etree import ElementTree

_MATH = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\$([^$\n]+?)\$|\\\((.+?)\\\)", re.DOTALL)
# How latex2mathml names a character in a text that it has not escaped yet.
_REFERENCE = re.compile(r"&#(?:x[0-9a-fA-F]+|[0-9]+);")

ELEMENTS = frozenset(
    (
        *("math", "menclose", "mfrac", "mi", "mn", "mo", "mover", "mpadded", "mphantom"),
        *("mroot", "mrow", "mspace", "msqrt", "mstyle", "msub", "msubsup", "msup", "mtable"),
        *("mtd", "mtext", "mtr", "munder", "munderover"),
    )
)
# None of them names an address, a style or a script.
ATTRIBUTES = frozenset(
    (
        *("accent", "accentunder", "columnalign", "columnlines", "columnspacing", "depth"),
        *("display", "displaystyle", "fence", "form", "height", "linebreak", "linethickness"),
        *("lspace", "mathbackground", "mathcolor", "mathsize", "mathvariant", "maxsize"),
        *("minsize", "movablelimits", "notation", "rowlines", "rowspacing", "rspace"),
        *("scriptlevel", "separator", "stretchy", "symmetric", "voffset", "width"),
    )
)
_VALUE = re.compile(r"[\w#%.+ -]*", re.ASCII)


def rendered(text: str) -> str:
    """Text as HTML: formulas as MathML, which browsers draw; one that cannot be read as it stands.

    MathML is of ELEMENTS with ATTRIBUTES alone; a formula that needs another element stands as it
    is, another attribute (a link, a style) is left out. ValueError without latex2mathml.
    """
    try:
        from latex2mathml import converter, exceptions
    except ImportError as error:
        raise ValueError('formulas are drawn by latex2mathml: pip install -e ".[data]"') from error
    own = [e for e in vars(exceptions).values() if isinstance(e, type) and issubclass(e, Exception)]
    # Of 12,000 formulas that were spoiled for a trial 4,091 raised, all one of these.
    unreadable = (*own, LookupError, RecursionError, StopIteration, ValueError)
    parts, at = [], 0
    for match in _MATH.finditer(text):
        parts.append(_plain(text[at : match.start()]))
        shown = match[1] or match[2]
        formula = shown or match[3] or match[4]
        try:
            # Its tree, not its text: that is unescaped, so that a < of a formula opens an element.
            tree = converter.convert_to_element(formula, display="block" if shown else "inline")
            parts.append(_markup(tree))
        except unreadable:
            parts.append(f"<code>{html.escape(match[0])}</code>")
        at = match.end()
    parts.append(_plain(text[at:]))
    return f'<div style="line-height:1.5">{"".join(parts)}</div>'


def _markup(element: ElementTree.Element) -> str:
    if element.tag not in ELEMENTS:
        raise ValueError(f"<{element.tag}> is no element that is shown")
    attributes = "".join(
        f' {name}="{value}"'
        for name, value in element.attrib.items()
        if name in ATTRIBUTES and _VALUE.fullmatch(value)
    )
    inner = _escaped(element.text) + "".join(_markup(e) + _escaped(e.tail) for e in element)
    return f"<{element.tag}{attributes}>{inner}</{element.tag}>"


def _escaped(text: str | None) -> str:
    return html.escape(_REFERENCE.sub(lambda found: html.unescape(found[0]), text or ""))


def _plain(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")
