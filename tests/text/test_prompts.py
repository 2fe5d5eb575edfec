import pytest
from hypothesis import given
from hypothesis import strategies as st

from mathv2_jax.text import parse, prompts

TEXTS = {
    "generator": "{statement}?",
    "verifier": "{statement} {proof}",
    "meta_verifier": "{statement} {proof} {analysis}",
    "refine": "{statement} {proof} {analysis}!",
}


def make(**texts: str) -> prompts.PromptSet:
    return prompts.make_set("mine", TEXTS | texts)


def write(folder, **texts: str):
    folder.mkdir(exist_ok=True)
    for role, text in (TEXTS | texts).items():
        (folder / f"{role}.txt").write_bytes(text.encode())
    return folder


def test_the_world_set_is_short_and_fixed():
    world = prompts.load("world")
    values = {"statement": "S", "proof": "P", "analysis": "A"}
    assert prompts.fill(world.generator, statement="S") == "S\nProve it."
    assert prompts.fill(world.verifier, statement="S", proof="P") == "S\nP\nEvaluate it."
    assert prompts.fill(world.meta_verifier, **values) == "S\nP\nA\nRate the evaluation."
    assert prompts.fill(world.refine, **values) == "S\nP\nA\nImprove it."


@pytest.mark.parametrize(
    ("role", "phrases"),
    [
        (
            "generator",
            [
                f"\n{parse.SOLUTION_HEADING}\n",
                f"\n{parse.SELF_EVALUATION_HEADING}\n",
                parse.ANALYSIS_OPENING,
                parse.ANALYSIS_VERDICT,
                "\\boxed{...}",
                "{statement}",
            ],
        ),
        (
            "verifier",
            [
                parse.ANALYSIS_OPENING,
                parse.ANALYSIS_VERDICT,
                "\\boxed{...}",
                "{statement}",
                "{proof}",
            ],
        ),
        (
            "meta_verifier",
            [
                parse.META_OPENING,
                parse.META_VERDICT,
                "\\boxed{...}",
                "{statement}",
                "{proof}",
                "{analysis}",
            ],
        ),
        (
            "refine",
            [
                f"\n{parse.SOLUTION_HEADING}\n",
                parse.ANALYSIS_VERDICT,
                "{statement}",
                "{proof}",
                "{analysis}",
            ],
        ),
    ],
)
def test_an_olympiad_template_shows_the_format_that_its_reader_expects(role, phrases):
    text = getattr(prompts.load("olympiad"), role).text
    places = [text.index(phrase) for phrase in phrases]
    assert places == sorted(places)


def test_an_answer_that_copies_the_olympiad_format_is_read():
    olympiad = prompts.load("olympiad")
    for role, read in [
        ("generator", parse.parse_generation),
        ("verifier", parse.parse_analysis),
        ("meta_verifier", parse.parse_meta_analysis),
    ]:
        text = getattr(olympiad, role).text
        assert read(text) is None
        assert read(text.replace("{...}", "{0.5}")) is not None


@given(st.text(), st.text())
def test_a_value_stands_in_the_prompt_as_it_is(statement, proof):
    template = make(verifier="a {proof} b {statement} c {proof}").verifier
    filled = prompts.fill(template, statement=statement, proof=proof)
    assert filled == f"a {proof} b {statement} c {proof}"


def test_a_field_inside_a_value_stays_text():
    filled = prompts.fill(make().verifier, statement="{proof} {statement}", proof=r"\1 {analysis}")
    assert filled == r"{proof} {statement} \1 {analysis}"


@pytest.mark.parametrize(
    "latex",
    [
        r"\boxed{s}",
        r"\begin{proof} so \end{proof}",
        r"\boxed{...}",
        r"x_{proof}^{statement}",
        r"\sqrt[n]{proof}",
        r"\operatorname*{proof}",
        r"\{proof\}",
        r"\frac{abc}{def}",
        r"{n}",
        r"{ proof }",
        r"{Proof}",
        r"{}",
        r"{0}",
        r"$\{x : x > 0\}$",
    ],
)
def test_the_braces_of_latex_stay(latex):
    template = make(verifier=latex + " {statement}{proof}").verifier
    assert prompts.fill(template, statement="S", proof="P") == latex + " SP"


def test_the_names_of_the_released_model_are_understood():
    released = make(
        generator="Solve: {question}",
        meta_verifier="{statement} {proof} {rating}",
        refine="{instruction}\n{proofs_to_refine}\nDo better.",
    )
    assert released.generator.text == "Solve: {statement}"
    assert prompts.fill(released.meta_verifier, statement="S", proof="P", analysis="A") == "S P A"
    assert released.refine.fields == ("statement", "proof", "analysis")
    filled = prompts.fill(released.refine, statement="{proof}", proof="P", analysis="A")
    assert filled.startswith("Solve: {proof}\n") and filled.endswith("\nDo better.")
    assert filled.index("\nP\n") < filled.index("\nA\n")


def test_a_template_spelt_with_aliases_is_the_same_template():
    canonical, alias = make().generator, make(generator="{question}?").generator
    assert alias == canonical
    assert make(generator="{statement}").generator.fingerprint != canonical.fingerprint


def test_a_folder_of_the_users_is_a_set(tmp_path):
    folder = write(tmp_path / "mine", generator="\ufeffProve:\r\n{statement}\r\n")
    loaded = prompts.load(folder)
    assert loaded.generator.name == "mine/generator"
    assert prompts.fill(loaded.generator, statement="S") == "Prove:\nS"
    assert loaded == prompts.load(str(folder) + "/")
    assert loaded.verifier == make().verifier


def test_an_unknown_set_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'olympiad'"):
        prompts.load("olympiade")
    assert prompts.packaged_sets() == ["olympiad", "world"]


def test_a_set_with_a_missing_or_broken_file_is_refused(tmp_path):
    folder = write(tmp_path / "mine")
    (folder / "refine.txt").write_bytes(b"\xff{statement}{proof}")
    with pytest.raises(ValueError, match=r"refine\.txt is not UTF-8"):
        prompts.load(folder)
    (folder / "refine.txt").unlink()
    with pytest.raises(ValueError, match=r"refine\.txt cannot be read"):
        prompts.load(folder)


@pytest.mark.parametrize(
    ("role", "text", "message"),
    [
        ("verifier", "{statement} {prof}", r"verifier\.txt: 'prof' .* did you mean 'proof'"),
        ("generator", "{statement} {proof}", r"generator\.txt: 'proof' is not a field"),
        ("verifier", "{statement} {proof} {rating}", r"'rating' is not a field; valid here: state"),
        ("refine", "{instruction} {proofs_to_refin}", "did you mean 'proofs_to_refine'"),
        ("verifier", "{statement}", r"verifier\.txt lacks the field \{proof\}"),
        ("meta_verifier", "{statement} {proof}", r"lacks the field \{analysis\}"),
        ("refine", "{statement} {analysis}", r"lacks the field \{proof\}"),
        ("generator", r"\text{statement}", r"lacks the field \{statement\}"),
    ],
)
def test_a_template_with_a_field_missing_or_unknown_is_refused(tmp_path, role, text, message):
    folder = write(tmp_path / "mine", **{role: text})
    with pytest.raises(ValueError, match=message):
        prompts.load(folder)


def test_filling_needs_every_field_and_knows_no_other():
    template = make().verifier
    with pytest.raises(ValueError, match="mine/verifier needs a value for proof"):
        prompts.fill(template, statement="S")
    with pytest.raises(ValueError, match="did you mean 'statement'"):
        prompts.fill(template, statment="S", proof="P")
    assert prompts.fill(template, statement="S", proof="P", analysis="A") == "S P"
