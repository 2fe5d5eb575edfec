"""What the world writes before any stage starts: D_p, D_v, D_mv, demonstrations, held-out sets.

Everything is a function of (config, seed). Problems are split by canonical form, so no problem of
the probe, validation or test sets has a renamed twin in any training source.
"""

import dataclasses
import hashlib
import random
from collections.abc import Iterable, Iterator

from mathv2_jax import records
from mathv2_jax.text import parse, prompts
from mathv2_jax.world import demonstrations, judge, problems

SPLITS = ("train", "probe", "validation", "test")
PATIENCE = 10_000  # problems drawn in vain before the dials are said to be too narrow


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Sizes of what is written, difficulty, and the error rate of the human-like labels.

    `num_graded_proofs` and `num_graded_analyses` are all the labels of the judge that training is
    given (D_v and D_mv), but for the `num_proofs` of each stage of kind `experts` in the recipe;
    each is wrong with probability `label_error`. Training learns of the truth from the
    demonstrations too: `writers` begin from the judge's findings before they err, and the drills
    cite where things stand, or that a rule is not given (the share `drill_misquoted` of the lines
    in source_drills). `graded_wrong_end` is `writers.wrong_end` for the proofs of D_v and of the
    probe alone, where set: experts grade careful work, the demonstrations come from everyone. How
    often a writer's verdict is the judge's in the end is what
    `python tools/writer_agreement.py` prints. Of the proofs that are there to be read, by
    verifiers, experts and tests, the share `careful_share` is by writers who do not stop early.

    Of a generator's demonstrations whose analysis finds fault the share `refine_share` are
    refinements: new proofs, or, in `repair_share` of them, what stands before the first fault,
    mended from there. What they refine has been mended 0 to `num_mended` times before.
    """

    dials: problems.Dials = dataclasses.field(default_factory=problems.Dials)
    writers: demonstrations.WriterRates = dataclasses.field(
        default_factory=demonstrations.WriterRates
    )
    num_drills: int = 6_000
    drill_lines: int = 6
    drill_misquoted: float = 0.2
    num_demonstrations: int = 24_000
    refine_share: float = 0.1
    repair_share: float = 0.0
    num_mended: int = 0
    num_problems: int = 4_000
    num_graded_proofs: int = 3_000
    num_graded_analyses: int = 2_000
    label_error: float = 0.05
    graded_wrong_end: float | None = None
    careful_share: float = 0.0
    num_probe: int = 300
    num_validation: int = 200
    num_test: int = 1_000

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "num_mended" else 1
            if field.name.startswith("num_") and value < least:
                raise ValueError(f"world.{field.name} = {value}: must be at least {least}")
        for name in ("refine_share", "label_error", "drill_misquoted"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"world.{name} = {getattr(self, name)}: must lie in [0, 1)")
        for name in ("repair_share", "careful_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"world.{name} = {getattr(self, name)}: must lie in [0, 1]")
        if self.graded_wrong_end is not None:
            try:
                self.graded_writers()
            except ValueError as error:
                raise ValueError(
                    f"world.graded_wrong_end = {self.graded_wrong_end}, in the place of "
                    f"world.writers.wrong_end: {error}"
                ) from None

    def graded_writers(self) -> demonstrations.WriterRates:
        """Who wrote the proofs that experts grade."""
        if self.graded_wrong_end is None:
            return self.writers
        return dataclasses.replace(self.writers, wrong_end=self.graded_wrong_end)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Everything the world wrote, as records."""

    problems: tuple[records.Problem, ...]  # D_p
    proofs: tuple[records.Proof, ...]  # D_v
    analyses: tuple[records.Analysis, ...]  # D_mv
    rule_drills: tuple[records.Demonstration, ...]
    source_drills: tuple[records.Demonstration, ...]
    demonstrations: tuple[records.Demonstration, ...]
    probe: tuple[records.Proof, ...]
    validation_problems: tuple[records.Problem, ...]
    test_problems: tuple[records.Problem, ...]
    test_proofs: tuple[records.Proof, ...]
    test_analyses: tuple[records.Analysis, ...]


def split_of(cluster: str) -> str:
    """The split that a canonical form belongs to, for every seed alike: 80, 4, 4, 12 percent."""
    place = int(hashlib.sha256(f"split:{cluster}".encode()).hexdigest()[:8], 16) % 100
    return SPLITS[0 if place < 80 else 1 if place < 84 else 2 if place < 88 else 3]


_WIDER = "widen world.dials.depth or world.dials.distractors, or raise world.dials.num_letters"


class _Author:
    """Draws problems of one split and writes about them; one random stream a purpose."""

    def __init__(self, config: WorldConfig, seed: int, split: str, purpose: int):
        self.config, self.split = config, split
        self.rng = random.Random(f"{seed}/{split}/{purpose}")

    def stream(self) -> Iterator[tuple[problems.WorldProblem, records.Problem]]:
        """Without end; ValueError where the dials allow no problem of the split."""
        in_vain = 0
        while True:
            problem = problems.make_problem(self.rng, self.config.dials)
            cluster = problems.canonical_form(problem)
            in_vain += 1
            if split_of(cluster) != self.split:
                if in_vain == PATIENCE:
                    raise ValueError(
                        f"none of {PATIENCE} problems belongs to the {self.split} split: the dials "
                        f"allow too few different ones; {_WIDER}"
                    )
                continue
            in_vain = 0
            statement = str(problem)
            yield (
                problem,
                records.Problem(
                    id=records.content_id("problem", statement),
                    statement=statement,
                    source="world",
                    cluster=cluster,
                ),
            )

    def proof(
        self, problem: problems.WorldProblem, record: records.Problem, *, read: bool = True
    ) -> records.Proof:
        """A proof to be read, or else to be imitated."""
        writers, careful_share = self.config.writers, self.config.careful_share
        if read and careful_share and self.rng.random() < careful_share:
            writers = dataclasses.replace(writers, stops=0.0)
        text = demonstrations.write_proof(self.rng, problem, writers)
        return records.Proof(
            id=records.content_id("proof", record.statement, text),
            problem_id=record.id,
            statement=record.statement,
            text=text,
            source="world-writer",
            parents=(record.id,),
        )

    def analysis(self, proof: records.Proof) -> records.Analysis:
        body, score = demonstrations.write_analysis(
            self.rng, proof.statement, proof.text, self.config.writers
        )
        text = parse.write_analysis(body, score)
        return records.Analysis(
            id=records.content_id("analysis", proof.statement, proof.text, text),
            problem_id=proof.problem_id,
            proof_id=proof.id,
            statement=proof.statement,
            proof=proof.text,
            text=text,
            score=score,
            source="world-analyst",
            parents=(proof.id,),
        )

    def analysis_of_kind(
        self, problem: problems.WorldProblem, record: records.Problem, *, faulty: bool
    ) -> tuple[records.Analysis, float]:
        """Proofs and analyses are written until one is faulty, or sound; with its true quality."""
        for _ in range(PATIENCE):
            analysis = self.analysis(self.proof(problem, record))
            quality = true_quality(analysis).quality
            if (quality < 1.0) == faulty:
                return analysis, quality
        raise ValueError(
            f"none of {PATIENCE} analyses was {'faulty' if faulty else 'sound'}: D_mv holds as "
            "many of either kind; "
            + ("raise" if faulty else "lower")
            + " world.writers.redraw, invent_flawed, invent_sound or overlook"
        )

    def repair(
        self, problem: problems.WorldProblem, proof: records.Proof, analysis: records.Analysis
    ) -> records.Proof:
        steps = judge.judge_proof(proof.statement, proof.text).steps
        assert steps is not None, "writers write well-formed proofs"
        named = true_quality(analysis).named
        text = demonstrations.write_repair(
            self.rng, problem, list(steps), named, self.config.writers
        )
        name = records.content_id("proof", proof.statement, text)
        return dataclasses.replace(proof, id=name, text=text)


def _human_label(
    rng: random.Random, true_score: float, rubric: str, error_rate: float
) -> records.Label:
    score = demonstrations.noisy_score(rng, true_score, error_rate)
    return records.Label(score=score, source="world", rater="noisy expert", rubric=rubric)


def _distinct(
    author: _Author, number: int
) -> Iterator[tuple[problems.WorldProblem, records.Problem]]:
    seen: set[str] = set()
    for tries, (problem, record) in enumerate(author.stream()):
        if record.id not in seen:
            seen.add(record.id)
            yield problem, record
        if len(seen) == number:
            return
        if tries > 50 * number + 1000:
            raise ValueError(
                f"the dials allow only {len(seen)} distinct {author.split} problems, {number} "
                f"were asked for: lower the number, or {_WIDER}"
            )


def graded_proofs(
    config: WorldConfig, seed: int, split: str, number: int, *, labelled: bool
) -> list[records.Proof]:
    """`number` distinct problems of a split with one written proof each.

    The labelled ones are by `config.graded_writers()`; where `graded_wrong_end` is 0, a proof that
    stops short all the same, since another fault had no room, is written anew.
    """
    if labelled:
        config = dataclasses.replace(config, writers=config.graded_writers())
    author = _Author(config, seed, split, 1)
    proofs = []
    for problem, record in _distinct(author, number):
        proof = author.proof(problem, record)
        if labelled:
            if config.graded_wrong_end == 0.0:
                proof = _reaching_the_goal(author, problem, record, proof)
            verdict = judge.judge_proof(proof.statement, proof.text)
            label = _human_label(author.rng, verdict.score, "I_v", config.label_error)
            proof = dataclasses.replace(proof, label=label)
        proofs.append(proof)
    return proofs


def _reaching_the_goal(
    author: _Author, problem: problems.WorldProblem, record: records.Problem, proof: records.Proof
) -> records.Proof:
    for _ in range(PATIENCE):
        issues = judge.judge_proof(proof.statement, proof.text).issues
        if all(issue.fault is not judge.Fault.NO_GOAL for issue in issues):
            return proof
        proof = author.proof(problem, record)
    raise ValueError(
        f"world.graded_wrong_end = 0, but {PATIENCE} proofs of {record.statement!r} all missed "
        "its goal: lower world.writers.unsupported, skipped or false_rule"
    )


def grade(config: WorldConfig, seed: int, proofs: Iterable[records.Proof]) -> list[records.Proof]:
    """Proofs of a generator, graded by the experts of D_v: wrong with probability `label_error`.

    The same proof is given the same label whenever it is asked for.
    """
    graded = []
    for proof in proofs:
        rng = random.Random(f"{seed}/experts/{proof.id}")
        true = judge.judge_proof(proof.statement, proof.text).score
        label = _human_label(rng, true, "I_v", config.label_error)
        graded.append(dataclasses.replace(proof, label=label))
    return graded


def graded_analyses(
    config: WorldConfig, seed: int, split: str, number: int, *, labelled: bool
) -> list[records.Analysis]:
    """`number` distinct problems of a split, a proof and one analysis of it each.

    Every other analysis is a faulty one: writers err seldom, and where most analyses are sound, a
    meta-verifier earns more by calling all of them sound than by looking.
    """
    author = _Author(config, seed, split, 2)
    analyses = []
    for place, (problem, record) in enumerate(_distinct(author, number)):
        analysis, quality = author.analysis_of_kind(problem, record, faulty=place % 2 == 1)
        if labelled:
            label = _human_label(author.rng, quality, "I_mv", config.label_error)
            analysis = dataclasses.replace(analysis, label=label)
        analyses.append(analysis)
    return analyses


def true_quality(analysis: records.Analysis) -> judge.AnalysisVerdict:
    """The judge's verdict on an analysis record."""
    parsed = parse.parse_analysis(analysis.text)
    if parsed is None:
        raise ValueError(f"analysis {analysis.id} is not in the verifier's format")
    return judge.judge_analysis(analysis.statement, analysis.proof, parsed.body, parsed.score)


def plain_problems(
    config: WorldConfig, seed: int, split: str, number: int
) -> list[records.Problem]:
    """`number` distinct problems of a split."""
    return [record for _, record in _distinct(_Author(config, seed, split, 3), number)]


def make_drills(config: WorldConfig, seed: int, *, sources: bool) -> list[records.Demonstration]:
    """Exercises in looking things up, for a model that starts from nothing: given rules recited in
    any order with their citations; with `sources`, a share of them misquoted. Only the citations
    are learned, since nothing else is decided. (Misquotes from the first step on delay the moment
    at which a rule's number is found at all.)"""
    author = _Author(config, seed, "train", 6 if sources else 5)
    made: list[records.Demonstration] = []
    for problem, record in author.stream():
        if len(made) == config.num_drills:
            return made
        text, learned = demonstrations.write_recital(
            author.rng,
            problem,
            config.drill_lines,
            sources=sources,
            misquoted=config.drill_misquoted if sources else 0.0,
        )
        user = f"{record.statement}\nRecite."
        made.append(
            dataclasses.replace(
                _demonstration("drill", record, user, text, (record.id,)), learned=learned
            )
        )
    raise AssertionError("the author's stream of problems has no end")


def make_demonstrations(
    config: WorldConfig, seed: int, templates: prompts.PromptSet
) -> list[records.Demonstration]:
    """Conversations for the cold start: the three roles in turn, some of the generator's as
    refinements."""
    author = _Author(config, seed, "train", 4)
    made: list[records.Demonstration] = []
    for problem, record in author.stream():
        if len(made) == config.num_demonstrations:
            return made
        generates = len(made) % 3 == 0
        proof = author.proof(problem, record, read=not generates)
        analysis = author.analysis(proof)
        if generates:
            made.append(_generation(author, templates, problem, record, proof, analysis))
        elif len(made) % 3 == 1:
            user = prompts.fill(templates.verifier, statement=proof.statement, proof=proof.text)
            made.append(_demonstration("verifier", record, user, analysis.text, (proof.id,)))
        else:
            made.append(_meta_analysis(author, templates, record, analysis))
    raise AssertionError("the author's stream of problems has no end")


def _meta_analysis(
    author: _Author,
    templates: prompts.PromptSet,
    problem: records.Problem,
    analysis: records.Analysis,
) -> records.Demonstration:
    statement, proof = analysis.statement, analysis.proof
    body, quality = demonstrations.write_meta_body(
        author.rng, statement, proof, true_quality(analysis), author.config.writers
    )
    user = prompts.fill(
        templates.meta_verifier, statement=statement, proof=proof, analysis=analysis.text
    )
    text = parse.write_meta_analysis(body, quality)
    return _demonstration("meta_verifier", problem, user, text, (analysis.id,))


def _demonstration(
    role: str, record: records.Problem, user: str, assistant: str, parents: tuple[str, ...]
) -> records.Demonstration:
    return records.Demonstration(
        id=records.content_id("demonstration", user, assistant),
        role=role,
        problem_id=record.id,
        user=user,
        assistant=assistant,
        source="world-drill" if role == "drill" else "world-writer",
        parents=parents,
    )


def _generation(
    author: _Author,
    templates: prompts.PromptSet,
    problem: problems.WorldProblem,
    record: records.Problem,
    proof: records.Proof,
    analysis: records.Analysis,
) -> records.Demonstration:
    """A generator's demonstration: a first proof, or the repair of a flawed one."""
    if author.rng.random() >= author.config.refine_share or analysis.score == 1.0:
        user = prompts.fill(templates.generator, statement=record.statement)
        text = parse.write_generation(proof.text, analysis.text)
        return _demonstration("generator", record, user, text, (record.id,))
    if author.config.num_mended:
        for _ in range(author.rng.randint(0, author.config.num_mended)):
            mended = author.repair(problem, proof, analysis)
            found = author.analysis(mended)
            if found.score == 1.0:
                break
            proof, analysis = mended, found
    user = prompts.fill(
        templates.refine, statement=record.statement, proof=proof.text, analysis=analysis.text
    )
    better = author.proof(problem, record, read=False)
    if author.config.repair_share and author.rng.random() < author.config.repair_share:
        better = author.repair(problem, proof, analysis)
    text = parse.write_generation(better.text, author.analysis(better).text)
    return _demonstration("refiner", record, user, text, (proof.id, analysis.id))


def make_corpus(config: WorldConfig, seed: int, templates: prompts.PromptSet) -> Corpus:
    """All files' contents. The test sets carry no label: the judge measures them afterwards."""
    return Corpus(
        problems=tuple(plain_problems(config, seed, "train", config.num_problems)),
        proofs=tuple(graded_proofs(config, seed, "train", config.num_graded_proofs, labelled=True)),
        analyses=tuple(
            graded_analyses(config, seed, "train", config.num_graded_analyses, labelled=True)
        ),
        rule_drills=tuple(make_drills(config, seed, sources=False)),
        source_drills=tuple(make_drills(config, seed, sources=True)),
        demonstrations=tuple(make_demonstrations(config, seed, templates)),
        probe=tuple(graded_proofs(config, seed, "probe", config.num_probe, labelled=True)),
        validation_problems=tuple(
            plain_problems(config, seed, "validation", config.num_validation)
        ),
        test_problems=tuple(plain_problems(config, seed, "test", config.num_test)),
        test_proofs=tuple(graded_proofs(config, seed, "test", config.num_test, labelled=False)),
        test_analyses=tuple(graded_analyses(config, seed, "test", config.num_test, labelled=False)),
    )
