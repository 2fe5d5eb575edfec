"""Problem clusters: layout never matters, small changes hardly, different problems stay apart."""

import random
import string

import pytest

from mathv2_jax.data import clusters

SUM = (
    "Let $a, b$ and $c$ be positive real numbers with $abc = 1$. Prove that "
    r"\[ \frac{1}{a + b} + \frac{1}{b + c} + \frac{1}{c + a} \leq \frac{3}{2}. \]"
)
BOARD = (
    "On a board of 2012 x 2012 cells some cells of one diagonal are marked, none in a corner. "
    "Prove that every number in the lower right corner is even."
)


def letters(seed: int, number: int) -> str:
    return "".join(random.Random(seed).choices(string.ascii_lowercase, k=number))


def test_layout_case_and_compatibility_forms_do_not_make_another_cluster() -> None:
    found = clusters.Clusters(0.8)
    same = SUM.upper().replace(" ", "\n ").replace("$", r"\(").replace("1", "\uff11")
    assert same != SUM
    assert found.of(same) == found.of(SUM)


def test_a_corrected_and_a_longer_statement_are_in_the_cluster_of_the_first() -> None:
    found = clusters.Clusters(0.8)
    first = found.of(SUM)
    assert found.of(SUM.replace(r"\frac{3}{2}", r"\frac{5}{2}")) == first
    assert found.of(SUM + " When does equality hold? (" + letters(0, 300) + ")") == first


def test_other_problems_are_other_clusters() -> None:
    found = clusters.Clusters(0.8)
    assert len({found.of(SUM), found.of(BOARD), found.of(letters(1, 200))}) == 3


@pytest.mark.parametrize(("shared", "together"), [(0.84, True), (0.76, False)])
def test_the_share_of_the_shorter_statement_decides(shared: float, together: bool) -> None:
    first, other = letters(2, 1007), letters(3, 1007)  # 1,000 shingles each
    cut = round(1000 * shared) + clusters.SHINGLE - 1
    found = clusters.Clusters(0.8)
    assert (found.of(first) == found.of(first[:cut] + other[cut:])) is together


def test_short_statements_have_only_exact_twins() -> None:
    found = clusters.Clusters(0.8)
    first = found.of("Solve x + y = 12.")
    assert found.of("Solve x+y=12") == first
    assert found.of("Solve x + y = 123.") != first


@pytest.mark.parametrize("near", [0.5, 0.8, 1.0])
def test_the_nearest_is_found_among_many_as_a_search_through_all_finds_it(near: float) -> None:
    base = [letters(seed, 150) for seed in range(40)]
    draw = random.Random(1)
    changed = []
    for seed in range(120):
        text = base[seed % 40]
        cut = draw.randrange(20, 150)
        changed.append(text[:cut] + letters(1000 + seed, draw.randrange(0, 120)))

    def shingles(text: str) -> set[str]:
        return {text[at : at + clusters.SHINGLE] for at in range(len(text) - clusters.SHINGLE + 1)}

    found, met = clusters.Clusters(near), list[tuple[str, set[str]]]()
    for text in base + changed:
        mine = shingles(text)
        shares = [(len(mine & s) / min(len(mine), len(s)), -at) for at, (_, s) in enumerate(met)]
        best, place = max(shares, default=(0.0, 0))
        cluster = found.of(text)
        is_near = len(mine) >= clusters.MIN_SHINGLES and best >= near
        assert (cluster in {name for name, _ in met}) is is_near
        if is_near:
            assert cluster == met[-place][0]
        if len(mine) >= clusters.MIN_SHINGLES:
            met.append((cluster, mine))


def test_statements_without_letters_or_digits_stay_apart() -> None:
    found = clusters.Clusters(0.8)
    assert found.of("$$ + $$") != found.of("$$ - $$")


def test_a_statement_between_two_clusters_makes_them_one() -> None:
    text = "".join(random.Random(4).choices(string.ascii_lowercase, k=400))
    made = clusters.Clusters(0.8)
    first, last = made.of(text[:300]), made.of(text[80:380])
    assert first != last
    between = made.of(text[40:340])
    assert between == made.current(first) == made.current(last) == made.of(text[80:380])
    assert made.joined == 1


@pytest.mark.parametrize("number", ["1. ", "(12) ", "Problem 3: ", "problem 4. ", "7) "])
def test_a_number_in_front_is_no_part_of_a_statement(number: str) -> None:
    made = clusters.Clusters(0.8)
    assert made.of("Show that 2 + 2 = 4.") == made.of(f"{number}Show that 2 + 2 = 4.")
    assert made.of("12 is even.") != made.of("is even.")
