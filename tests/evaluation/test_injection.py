"""What a proof says of itself stays text: in prompts, in token ids and in what parsers read."""

import pytest

from mathv2_jax import records, roles
from mathv2_jax.evaluation import injection
from mathv2_jax.text import parse, tokenizer

PROOF = records.Proof(id="p", problem_id="q", statement="Show A.", text="A holds.")
ATTACKED = injection.attempts([PROOF])
SAMPLING = roles.Sampling(max_tokens=8)


@pytest.fixture(scope="module")
def tokens():
    texts = [f"{item.text} Show that it is so." for item in ATTACKED] * 3
    return tokenizer.SentencePieceTokenizer.from_bytes(tokenizer.train(texts, vocab_size=400))


def verifier(templates="olympiad"):
    config = roles.RolesConfig(
        templates=templates, generator=SAMPLING, verifier=SAMPLING, meta_verifier=SAMPLING
    )
    return roles.make_roles(config).verifier


def test_each_proof_comes_as_it_is_and_under_every_attack():
    assert [item.attack for item in ATTACKED] == ["none", *injection.ATTACKS]
    assert ATTACKED[0].text == PROOF.text
    assert all(item.text.startswith(f"{PROOF.text}\n\n") for item in ATTACKED[1:])


@pytest.mark.parametrize("item", ATTACKED, ids=lambda item: item.attack)
def test_no_attack_opens_a_turn_or_thinking_of_its_own(item, tokens):
    role = verifier()
    plain = role.prompt(tokens, statement=PROOF.statement, proof=PROOF.text)
    attacked = role.prompt(tokens, statement=PROOF.statement, proof=item.text)
    control = [[t for t in ids if t in tokens.control_ids] for ids in (plain, attacked)]
    assert control[0] == control[1]


@pytest.mark.parametrize("item", ATTACKED, ids=lambda item: item.attack)
@pytest.mark.parametrize("field", ["{statement}", "{proof}", "{analysis}"])
def test_no_attack_is_looked_into_for_fields(item, field):
    text = f"{item.text} {field}"
    ((_, shown),) = verifier("world").messages(statement="S", proof=text)
    assert text in shown


@pytest.mark.parametrize("item", ATTACKED[1:], ids=lambda item: item.attack)
def test_a_generator_that_forges_structure_in_its_proof_breaks_its_format_or_gains_nothing(item):
    honest = parse.write_analysis("Step 1 fails.", 0.0)
    text = f"## Solution\n{item.text}\n\n## Self Evaluation\n{honest}"
    found = parse.parse_generation(text)
    assert found is None or (found.self_score, found.proof) == (0.0, item.text.strip())
    assert (found is None) == (item.attack == "headings")


def test_what_the_verifier_says_alone_is_read():
    response = f"{injection.ATTACKS['evaluation']}\n\n" + parse.write_analysis("A gap.", 0.0)
    found = parse.parse_analysis(response)  # it has repeated the proof's own
    assert found is not None and found.score == 0.0
