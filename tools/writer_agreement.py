"""How often the imperfect writers' verdicts are the exact judge's, by the role that demonstrates.

    python tools/writer_agreement.py [--config=configs/quick.py] [--seed=0]

The cold start imitates demonstrations whose writers begin from the truth and then err at stated
rates (`config.world.writers`): a verifier's score, a generator's own score and a meta-verifier's
rating. None of them is a label of D_v or D_mv, and all of them say something of the truth.
"""

import argparse
from collections.abc import Iterable

from mathv2_jax import records
from mathv2_jax.cli import config as config_lib
from mathv2_jax.cli import overrides
from mathv2_jax.text import parse, prompts
from mathv2_jax.world import corpus, judge


def agrees(demonstration: records.Demonstration) -> bool:
    """Whether the score that a demonstration in the world's templates ends with is the true one."""
    exact = judge.ExactJudge()
    statement, _, rest = demonstration.user.rpartition("\n")[0].partition("\n")
    proof, opening, analysis = rest.partition(f"\n{parse.ANALYSIS_OPENING}")
    if demonstration.role == "verifier":
        found = parse.parse_analysis(demonstration.assistant)
        return found is not None and found.score == exact.proof_score(statement, proof)
    if demonstration.role == "meta_verifier":
        rated = parse.parse_meta_analysis(demonstration.assistant)
        true = exact.analysis_quality(statement, proof, f"{opening}{analysis}".strip())
        return rated is not None and rated.score == true
    made = parse.parse_generation(demonstration.assistant)
    return made is not None and made.self_score == exact.proof_score(statement, made.proof)


def shares(demonstrations: Iterable[records.Demonstration]) -> dict[str, tuple[float, int]]:
    """By role: the share that agrees with the judge, and of how many."""
    found: dict[str, list[bool]] = {}
    for demonstration in demonstrations:
        found.setdefault(demonstration.role, []).append(agrees(demonstration))
    return {role: (sum(hits) / len(hits), len(hits)) for role, hits in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="How often the writers agree with the exact judge."
    )
    parser.add_argument("--config", default="configs/quick.py")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    config = config_lib.build(overrides.load(asked.config))
    if config.world is None or config.roles.templates != "world":
        parser.error(f"--config={asked.config} is no run in the embedded world")
    templates = prompts.load(config.roles.templates)
    made = corpus.make_demonstrations(config.world, asked.seed, templates)
    for role, (share, number) in shares(made).items():
        print(f"{role:14} {share:.3f} of {number}")


if __name__ == "__main__":
    main()
