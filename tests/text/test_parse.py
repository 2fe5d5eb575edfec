import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mathv2_jax.text import parse

SCORES = st.sampled_from([0.0, 0.5, 1.0])
FRAGMENTS = st.sampled_from(
    [
        *parse.KEY_PHRASES,
        parse.ANALYSIS_VERDICT.replace("overall", "overal"),
        *("\n", "\r\n", "\n\n", " ", "```", "````", "~~~", "\n```\n", "```python", "x", "."),
        *("\\boxed", "\\boxed{", "{", "}", "0.3", "1", "0.5", "\\boxed{{1}}", "\\boxed{2}"),
        *("## ", "### Solution", "## Solutions", "\x0b", "\u2028", "\ud800", "\x00"),
    ]
)
PIECED = st.lists(FRAGMENTS | st.text(max_size=8), max_size=40).map("".join)


def analysis(box: str) -> str:
    return f"{parse.ANALYSIS_OPENING}\nfine\n{parse.ANALYSIS_VERDICT}\n{box}"


SOUND = analysis(r"\boxed{1}")


def generation(proof: str, evaluation: str = SOUND) -> str:
    return f"## Solution\n{proof}\n\n## Self Evaluation\n{evaluation}"


@given(st.text() | PIECED)
def test_no_text_makes_a_reader_raise(text):
    for read in (parse.parse_analysis, parse.parse_meta_analysis, parse.parse_generation):
        read(text)


@given(st.text() | PIECED)
def test_what_is_read_is_stripped_text_of_the_response_and_a_valid_score(text):
    for parsed in (parse.parse_analysis(text), parse.parse_meta_analysis(text)):
        if parsed is not None:
            assert parsed.score in (0.0, 0.5, 1.0)
            assert parsed.body == parsed.body.strip() and parsed.body in text
    generated = parse.parse_generation(text)
    if generated is not None:
        assert generated.proof in text and generated.self_analysis in text
        assert parse.parse_analysis(generated.self_analysis) is not None


@given(st.text() | PIECED, SCORES)
def test_a_written_analysis_is_read_back_whatever_its_body_holds(body, score):
    assert parse.parse_analysis(parse.write_analysis(body, score)) == (body.strip(), score)
    assert parse.parse_meta_analysis(parse.write_meta_analysis(body, score)) == (
        body.strip(),
        score,
    )


@given(st.text() | PIECED, st.text() | PIECED, SCORES)
def test_a_written_generation_is_read_back_or_refused(proof, body, score):
    evaluation = parse.write_analysis(body, score)
    try:
        text = parse.write_generation(proof, evaluation)
    except ValueError:
        headings = ("## Solution", "## Self Evaluation")
        assert "```" in proof or "~~~" in proof or any(h in proof + body for h in headings)
    else:
        assert parse.parse_generation(text) == (proof.strip(), evaluation, score)


def test_an_evaluation_that_is_no_analysis_is_not_written():
    with pytest.raises(ValueError, match="cannot be read back"):
        parse.write_generation("proof", "it is right")


def test_a_score_off_the_scale_is_not_written():
    with pytest.raises(ValueError, match=r"0\.3"):
        parse.write_analysis("body", 0.3)


def test_the_parts_of_a_response_written_by_hand():
    text = (
        "Sure.\n## Solution  \nLet $x$.\n\nDone.\n\n## Self Evaluation\n"
        "Here is my evaluation of the solution:\nStep 1 holds.\n\n"
        "Based on my evaluation, the final overall score should be:\n$$\\boxed{0.5}$$ \n"
    )
    proof, evaluation, score = parse.parse_generation(text) or ("", "", -1)
    assert (proof, score) == ("Let $x$.\n\nDone.", 0.5)
    assert evaluation.startswith(parse.ANALYSIS_OPENING) and evaluation.endswith(r"\boxed{0.5}$$")
    assert parse.parse_analysis(evaluation) == ("Step 1 holds.", 0.5)


@pytest.mark.parametrize(
    ("box", "score"),
    [
        (r"\boxed{0}", 0.0),
        (r"\boxed{0.5}", 0.5),
        (r"\boxed{1}", 1.0),
        (r"\boxed{1.0}", 1.0),
        (r"\boxed{1.}", 1.0),
        (r"\boxed{.5}", 0.5),
        (r"\boxed{0.50}", 0.5),
        (r"\boxed{0.0}", 0.0),
        (r"\boxed{{1}}", 1.0),
        (r"\boxed { { 0.5 } }", 0.5),
        (r"{\boxed{1}}", 1.0),
        (r"**\boxed{1}**. So it is.", 1.0),
        (r"\boxed{0.3}", None),
        (r"\boxed{1.00000000000000000000000001}", None),
        (r"\boxed{10}", None),
        (r"\boxed{-0}", None),
        (r"\boxed{}", None),
        (r"\boxed{.}", None),
        (r"\boxed{1/2}", None),
        (r"\boxed{0, 1}", None),
        (r"\boxed{s = 1}", None),
        (r"\boxed{\text{1}}", None),
        (r"\boxed{１}", None),
        (r"\boxed{{1}", None),
        (r"\boxed{1", None),
        (r"\boxed 1", None),
        (r"\boxedtext{1}", None),
        ("1", None),
        ("", None),
    ],
)
def test_a_box_holds_exactly_one_of_the_three_numbers(box, score):
    parsed = parse.parse_analysis(analysis(box))
    assert (parsed and parsed.score) == score


@pytest.mark.parametrize(
    ("boxes", "score"),
    [
        (r"\boxed{0} or rather \boxed{1}", 1.0),
        (r"\boxed{0.3} or rather \boxed{1}", 1.0),
        (r"\boxed{1} or rather \boxed{0.3}", None),
        (r"\boxed{1} in a \boxedfigure{2}", 1.0),
        (r"\boxed{1} or rather \boxed{", None),
    ],
)
def test_the_last_box_counts(boxes, score):
    parsed = parse.parse_analysis(analysis(boxes))
    assert (parsed and parsed.score) == score


def test_a_box_before_the_verdict_is_no_score():
    assert parse.parse_analysis(analysis("none").replace("fine", r"\boxed{1}")) is None


def test_the_misspelt_verdict_is_a_verdict():
    assert "overall" in SOUND
    assert parse.parse_analysis(SOUND.replace("overall", "overal")) == ("fine", 1.0)
    assert parse.parse_analysis(SOUND.replace("overall", "over")) is None


@pytest.mark.parametrize("phrase", [parse.ANALYSIS_OPENING, parse.ANALYSIS_VERDICT])
def test_an_analysis_without_either_phrase_is_none(phrase):
    assert parse.parse_analysis("x" * 99 + SOUND.replace(phrase, "")) is None


def test_a_verdict_before_the_opening_is_out_of_order():
    assert parse.parse_analysis(f"{parse.ANALYSIS_VERDICT}\n{parse.ANALYSIS_OPENING}\n") is None
    text = f"{parse.ANALYSIS_VERDICT}\n{parse.ANALYSIS_OPENING}\n\\boxed{{1}}"
    assert parse.parse_analysis(text) is None


def test_the_last_of_two_verdicts_counts_in_either_spelling():
    misspelt = parse.ANALYSIS_VERDICT.replace("overall", "overal")
    for first, last in [(parse.ANALYSIS_VERDICT, misspelt), (misspelt, parse.ANALYSIS_VERDICT)]:
        text = f"{parse.ANALYSIS_OPENING}{first}\\boxed{{0}}{last}\\boxed{{1}}"
        assert parse.parse_analysis(text) == (f"{first}\\boxed{{0}}", 1.0)


def test_an_analysis_is_not_read_as_a_meta_analysis_nor_the_reverse():
    assert parse.parse_meta_analysis(SOUND) is None
    assert parse.parse_analysis(parse.write_meta_analysis("fine", 1.0)) is None


@pytest.mark.parametrize(
    "text",
    [
        SOUND,
        f"## Solution\nproof\n{SOUND}",
        f"proof\n## Self Evaluation\n{SOUND}",
        f"## Self Evaluation\n{SOUND}\n## Solution\nproof",
        generation("proof\n## Solution\nproof"),
        generation("proof\n## Self Evaluation\nproof"),
        generation("proof", f"{SOUND}\n## Solution"),
        generation("proof", "It is right."),
        generation("proof", analysis(r"\boxed{0.3}")),
        generation("proof").replace("## Solution", " ## Solution"),
        generation("proof").replace("## Solution", "### Solution"),
        generation("proof").replace("## Solution", "## Solutions"),
        generation("proof").replace("## Solution", "## solution"),
        generation("proof").replace("\n## Self", " ## Self"),
        generation("```\nproof"),
        "```\n" + generation("proof") + "\n```",
        f"## Solution\nproof {parse.ANALYSIS_OPENING}\n## Self Evaluation\n"
        + SOUND.replace(parse.ANALYSIS_OPENING, ""),
    ],
)
def test_a_heading_missing_repeated_misplaced_or_fenced_breaks_the_format(text):
    assert parse.parse_generation(text) is None


@pytest.mark.parametrize(
    "proof",
    [
        "```\n## Solution\n```",
        "```markdown\n## Self Evaluation\n```\nso",
        "~~~\n```\n## Solution\n~~~",
        "````\n```\n## Solution\n````",
        "```\n## Solution\n``` no end\n## Solution\n   ````",
        "a `## Solution` inside a line\nand ## Solution there",
        "### Solution\n## Solution of the lemma\n > ## Solution\n ## Solution",
        "the mark ``` inside a line\n    ```\nindented",
        "```x`y\nno fence, its info holds a backtick",
        "```\r\n## Solution\r\n```",
        "a\u2028## Solution\x0b## Solution\x0c",
        "",
    ],
)
def test_headings_in_code_fences_and_inside_lines_do_not_count(proof):
    assert parse.parse_generation(generation(proof)) == (proof.strip(), SOUND, 1.0)


def test_lines_may_end_as_on_windows():
    assert parse.parse_generation(generation("a\nb").replace("\n", "\r\n")) == (
        "a\r\nb",
        SOUND.replace("\n", "\r\n"),
        1.0,
    )


def test_every_phrase_a_reader_looks_for_is_among_the_key_phrases():
    written = parse.write_generation("", parse.write_analysis("", 0.5))
    written += parse.write_meta_analysis("", 1.0)
    for phrase in parse.KEY_PHRASES:
        written = written.replace(phrase, "")
    assert written.strip() == ""


def test_a_hundred_thousand_broken_responses_are_read_or_are_none():
    """Pieces of every format, in any order, cut anywhere: nothing raises, scores are scores."""
    draw = random.Random(0)
    pieces = [
        *parse.KEY_PHRASES,
        "```",
        "~~~~",
        "\n",
        "\n## ",
        "\\boxed{",
        "{",
        "}",
        "0.5",
        "1",
        "x",
    ]
    pieces += ["<think>", "</think>", "\u2028", "\r", "\x00", "\ud800", "é" * 40, "\\boxed{{{1}}}"]
    whole = parse.write_generation("A proof.", parse.write_analysis("Fine.", 1.0))
    read = 0
    for _ in range(100_000):
        text = "".join(draw.choices(pieces, k=draw.randrange(12)))
        if draw.random() < 0.3:
            at = draw.randrange(len(whole))
            text = (
                whole[:at]
                + text
                + whole[at if draw.random() < 0.5 else draw.randrange(len(whole)) :]
            )
        for found in (
            parse.parse_analysis(text),
            parse.parse_meta_analysis(text),
            parse.parse_generation(text),
        ):
            read += found is not None
            assert found is None or found[-1] in (0.0, 0.5, 1.0)
    assert read > 1000  # some of them are in a format
