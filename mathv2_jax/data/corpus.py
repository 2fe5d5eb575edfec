"""What real files give a run before its first stage: D_p, D_v, D_mv, demonstrations, held-out sets.

Evaluation problems are never learned from: a training row whose problem shares a cluster with one
of them is left out and named. Probe and test clusters are taken out of training in the same way.
Every row of every file is used or is among the rejects, with the rule that left it out.

Demonstrations, for the cold start alone, are real texts in the project's formats:
- verifier: a listed analysis of a training proof (a model's, judged by nobody) under the human
  verdict of that proof as its score; only where the two agree, issues with 0, none with 1;
- meta-verifier: a critique, answered by what the person who judged it said, and ms;
- generator: a proof that earns a 1, followed by a self-evaluation of one sentence that says no more
  than what is known: that a person accepted it, and on which scale.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from mathv2_jax import records
from mathv2_jax.data import clusters as clusters_lib
from mathv2_jax.data import graded, importing
from mathv2_jax.data import store as store_lib
from mathv2_jax.text import parse, prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealConfig:
    """Which labels are learned from together, what is held out, and limits.

    Labels of a scale other than `scales.target` are learned from only by `scales.pairs`, which is
    empty by default: nothing is mixed. `sources` are those that are used, empty: all.
    `judged_needed` says that D_mv may not be empty. `near` is the share of a shorter statement's
    text that makes two statements one cluster.

    `num_probe`, `num_test` and `num_validation` count clusters: of graded problems for the first
    two, of unlabelled ones for the third. Prompts over `max_prompt_tokens` and demonstrations over
    `max_example_tokens` are left out.
    """

    sources: tuple[str, ...] = ()
    scales: graded.ScaleMap = dataclasses.field(default_factory=graded.ScaleMap)
    judged_needed: bool = True
    near: float = 0.8
    num_probe: int = 6
    num_test: int = 3
    num_validation: int = 50
    max_prompt_tokens: int = 4096
    max_example_tokens: int = 4096

    def __post_init__(self):
        if not 0.5 <= self.near <= 1.0:
            raise ValueError(f"real.near = {self.near}: must lie in 0.5..1")
        for name in ("num_probe", "num_test", "num_validation"):
            if getattr(self, name) < 1:
                raise ValueError(f"real.{name} = {getattr(self, name)}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class Item:
    """A record with the file and line that it comes from, and its problem's cluster."""

    record: Any
    file: str
    line: int
    cluster: str

    def reject(self, rule: str, reason: str) -> store_lib.Reject:
        """It, left out by `rule`."""
        return store_lib.Reject(
            file=self.file, line=self.line, id=self.record.id, rule=rule, reason=reason
        )


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The input files by name, with where each record comes from, and all records left out."""

    files: Mapping[str, list[Item]]
    rejects: list[store_lib.Reject]

    def records(self) -> dict[str, list[Any]]:
        """What is written: the records of each file, and the rejects."""
        found = {name: [i.record for i in items] for name, items in self.files.items()}
        return {**found, "rejects": list(self.rejects)}


TRAINING = ("problems", "proofs", "analyses", "demonstrations")
HELD_OUT = ("probe", "validation_problems", "test_problems", "test_proofs", "test_analyses")


class _Reader:
    """A store's records by what they are for; keeps the rejects, its import's among them."""

    def __init__(self, store: store_lib.Store, config: RealConfig):
        self.rejects = store.of(store_lib.Reject)
        self._clusters = clusters_lib.Clusters(config.near)
        self.evaluation: list[Item] = []
        self.training: list[Item] = []
        self.withdrawn: dict[str, str] = {}  # the file that withdraws, by cluster
        imports = store.imports()
        known = {source for source in map(_source, store.latest()) if source}
        unknown = sorted(set(config.sources) - known)
        if unknown:
            raise ValueError(
                f"real.sources names {', '.join(unknown)}; {store.folder} has "
                f"{', '.join(sorted(known))}"
            )
        evaluated, given_up = store.marked("evaluation"), store.marked("withdraws")
        found: list[Item] = []
        for record in store.latest():
            if isinstance(record, store_lib.Import | store_lib.Reject):
                continue
            if config.sources and _source(record) not in config.sources:
                continue
            number, line = store_lib.import_of(record)
            cluster = self._clusters.of(record.statement)
            found.append(Item(record, imports[number].file, line, cluster))
        for item in found:  # clusters are known by now
            item = dataclasses.replace(item, cluster=self._clusters.current(item.cluster))
            key = type(item.record), item.record.id
            held = key in evaluated and key not in given_up
            (self.evaluation if held else self.training).append(item)
            if key in given_up:
                self.withdrawn.setdefault(item.cluster, item.file)
        self.false_variants = {
            i.record.id for i in found if getattr(i.record, "false_variant_of", None)
        }

    def of(self, kind: type, items: Sequence[Item]) -> list[Item]:
        """Those of a kind; statements that are false on purpose are no problems to learn from."""
        return [
            item
            for item in items
            if isinstance(item.record, kind) and not getattr(item.record, "false_variant_of", None)
        ]

    def part(
        self, items: Sequence[Item], clusters: Collection[str], rule: str, reason: str
    ) -> list[Item]:
        """Items outside `clusters`; those inside go to the rejects by `rule`."""
        for item in items:
            if item.cluster in clusters:
                self.rejects.append(item.reject(rule, reason))
        return [i for i in items if i.cluster not in clusters]


def _source(record: Any) -> str:
    return getattr(record, "source", "")


def make_corpus(store: store_lib.Store, config: RealConfig, templates: prompts.PromptSet) -> Corpus:
    """Everything but the limits on length (`within_limits`).

    ValueError says why nothing is left of a file (`require_enough`), or that too few graded
    problems are left to hold some out.
    """
    reader = _Reader(store, config)
    test_problems, test_proofs = (
        reader.of(kind, reader.evaluation) for kind in (records.Problem, records.Proof)
    )
    problems, proofs, analyses = (
        reader.of(kind, reader.training)
        for kind in (records.Problem, records.Proof, records.Analysis)
    )
    reason = "a file that was imported with --withdraw trains on its problem"
    test_problems, test_proofs = (
        reader.part(items, reader.withdrawn, "withdrawn", reason)
        for items in (test_problems, test_proofs)
    )
    test_problems = _once(reader, test_problems)
    evaluated = {i.cluster for i in (*test_problems, *test_proofs)}
    reason = "its problem, or one that reads nearly the same, is kept for evaluation"
    proofs, analyses, problems = (
        reader.part(items, evaluated, "evaluation", reason)
        for items in (proofs, analyses, problems)
    )
    judged = [i for i in analyses if i.record.label is not None]
    listed = [i for i in analyses if i.record.label is None]

    proofs = [i for i in proofs if i.record.label is not None and not _too_good(reader, i)]
    verdicts = {i.record.id: i.record.label for i in proofs if i.record.label.source == "human"}
    proofs = _mapped(reader, proofs, config.scales)
    busy = {i.cluster for i in judged} | set(reader.withdrawn)
    probe, test = _hold_out({i.cluster for i in proofs} - busy, config)
    test_analyses = [i for i in listed if i.cluster in test]
    reason = "its problem is held out for the probe or the test"
    listed = reader.part([i for i in listed if i.cluster not in test], probe, "held-out", reason)
    problems = reader.part(problems, probe | test, "held-out", reason)
    busy |= {i.cluster for i in (*proofs, *listed)}
    validation = _chosen({i.cluster for i in problems} - busy, config.num_validation)
    learned = [i for i in proofs if i.cluster not in probe | test]
    files = {
        "problems": [i for i in problems if i.cluster not in validation],
        "proofs": learned,
        "analyses": judged,
        "demonstrations": [
            *_verifier_demonstrations(reader, listed, verdicts, config, templates),
            *(_meta_demonstration(i, templates) for i in judged),
            *_generator_demonstrations(reader, learned, templates),
        ],
        "probe": [i for i in proofs if i.cluster in probe],
        "validation_problems": [i for i in problems if i.cluster in validation],
        "test_problems": test_problems,
        "test_proofs": [*test_proofs, *(i for i in proofs if i.cluster in test)],
        "test_analyses": test_analyses,
    }
    corpus = Corpus(files, reader.rejects)
    require_disjoint(corpus)
    return require_enough(corpus, config)


def _too_good(reader: _Reader, item: Item) -> bool:
    """Whether a proof of a false statement has a label above 0; then it is a reject."""
    proof = item.record
    wrong = proof.problem_id in reader.false_variants and proof.label.score > 0.0
    if wrong:
        reason = "its statement is a false variant, of which no proof is more than a 0"
        reader.rejects.append(item.reject("conflicting-label", reason))
    return wrong


def _once(reader: _Reader, items: Sequence[Item]) -> list[Item]:
    """One evaluation problem a cluster: contests are found in several files."""
    first: dict[str, Item] = {}
    for item in items:
        if first.setdefault(item.cluster, item) is not item:
            same = first[item.cluster]
            reason = f"its problem reads nearly as that of {same.file}, line {same.line}"
            reader.rejects.append(item.reject("duplicate", reason))
    return list(first.values())


def _mapped(reader: _Reader, items: Sequence[Item], scales: graded.ScaleMap) -> list[Item]:
    found = []
    for item in items:
        try:
            label = scales.mapped(item.record.label)
        except ValueError as error:
            reader.rejects.append(item.reject("scale", str(error)))
            continue
        found.append(dataclasses.replace(item, record=_labelled(item.record, label)))
    return found


def _labelled(proof: records.Proof, label: records.Label) -> records.Proof:
    return dataclasses.replace(proof, label=label)


def _chosen(clusters: Collection[str], number: int) -> set[str]:
    """`number` of the clusters, the same for every seed."""
    return set(sorted(clusters, key=lambda c: hashlib.sha256(c.encode()).hexdigest())[:number])


def _hold_out(clusters: Collection[str], config: RealConfig) -> tuple[set[str], set[str]]:
    """The probe's and the test's clusters among those of the labelled proofs."""
    wanted = config.num_probe + config.num_test
    if clusters and len(clusters) <= wanted:
        raise ValueError(
            f"only {len(clusters)} graded problems may be learned from, and real.num_probe + "
            f"real.num_test = {wanted} of them are to be held out: lower these"
        )
    probe = _chosen(clusters, config.num_probe)
    return probe, _chosen(set(clusters) - probe, config.num_test)


def _demonstration(item: Item, role: str, problem_id: str, user: str, assistant: str) -> Item:
    record = records.Demonstration(
        id=records.content_id("demonstration", user, assistant),
        role=role,
        problem_id=problem_id,
        user=user,
        assistant=assistant,
        source=item.record.source,
        parents=(item.record.id,),
    )
    return dataclasses.replace(item, record=record)


def _verifier_demonstrations(
    reader: _Reader,
    items: Sequence[Item],
    verdicts: Mapping[str, records.Label],
    config: RealConfig,
    templates: prompts.PromptSet,
) -> list[Item]:
    """`verdicts` are people's, by the id of a proof."""
    found = []
    for item in items:
        analysis: records.Analysis = item.record
        label = verdicts.get(analysis.proof_id)
        if label is None:
            reason = "nobody judged its proof, so no score can stand below it"
            reader.rejects.append(item.reject("no-verdict", reason))
            continue
        try:
            score = config.scales.mapped(label).score
        except ValueError as error:
            reader.rejects.append(item.reject("scale", str(error)))
            continue
        if score != analysis.score:
            reason = f"its issues speak for a {analysis.score:g}, the human verdict is {score:g}"
            reader.rejects.append(item.reject("contradiction", reason))
            continue
        user = prompts.fill(templates.verifier, statement=analysis.statement, proof=analysis.proof)
        found.append(_demonstration(item, "verifier", analysis.problem_id, user, analysis.text))
    return found


def _meta_demonstration(item: Item, templates: prompts.PromptSet) -> Item:
    analysis: records.Analysis = item.record
    assert analysis.label is not None, "a judged critique has a label"
    agrees = analysis.label.score == 1.0
    said = "confirms the defect" if agrees else "does not confirm the defect"
    body = f"A person who checked the solution {said} that the evaluation names."
    if analysis.label.comment:
        body += f"\n{analysis.label.comment}"
    user = prompts.fill(
        templates.meta_verifier,
        statement=analysis.statement,
        proof=analysis.proof,
        analysis=analysis.text,
    )
    text = parse.write_meta_analysis(body, analysis.label.score)
    return _demonstration(item, "meta_verifier", analysis.problem_id, user, text)


def _generator_demonstrations(
    reader: _Reader, items: Sequence[Item], templates: prompts.PromptSet
) -> list[Item]:
    found = []
    for item in items:
        proof: records.Proof = item.record
        if proof.label is None or proof.label.score < 1.0:
            continue
        body = f"A person who graded it accepted it, on the scale {proof.label.scale}."
        try:
            text = parse.write_generation(proof.text, parse.write_analysis(body, 1.0))
        except ValueError as error:
            reader.rejects.append(item.reject("format", str(error)))
            continue
        user = prompts.fill(templates.generator, statement=proof.statement)
        found.append(_demonstration(item, "generator", proof.problem_id, user, text))
    return found


def require_disjoint(corpus: Corpus) -> None:
    """ValueError where a cluster stands in a training file and in a held-out one."""
    held = {i.cluster: name for name in HELD_OUT for i in corpus.files[name]}
    for name in TRAINING:
        for item in corpus.files[name]:
            if item.cluster in held:
                raise ValueError(
                    f"{item.file}, line {item.line} ({item.record.id}) is in the training "
                    f"file {name}, its problem also in {held[item.cluster]}"
                )


def require_enough(corpus: Corpus, config: RealConfig) -> Corpus:
    """The corpus; ValueError where a file that a run needs is empty, or the probe holds one
    proof, with what was left out.

    D_mv may be empty only where `config.judged_needed` is False.
    """
    needed = ["problems", "proofs", "demonstrations", "probe"]
    if config.judged_needed:
        needed.append("analyses")
    for name in needed:
        least = 2 if name == "probe" else 1  # one error alone has no standard error
        if len(corpus.files[name]) < least:
            raise ValueError(
                f"the real data leave {len(corpus.files[name])} records for records/input/"
                f"{name}.jsonl, which needs {least}; left out were:\n"
                f"{importing.describe(corpus.rejects) or 'no rows at all'}\n"
                "scales are mapped by config.real.scales.pairs, and evaluation problems given up "
                "to a training file by mathv2-records --withdraw"
            )
    return corpus


def within_limits(
    corpus: Corpus,
    config: RealConfig,
    templates: prompts.PromptSet,
    num_tokens: Callable[[str], int],
) -> Corpus:
    """The corpus without what is too long; `num_tokens` counts a text's, control tokens included.

    ValueError as in `require_enough`.
    """
    kept: dict[str, list[Item]] = {}
    rejects = list(corpus.rejects)
    for name, items in corpus.files.items():
        kept[name] = []
        for item in items:
            text, limit = _longest_text(item.record, config, templates)
            # A token is a byte at least, so most texts need no counting.
            size = 0 if len(text.encode()) + 8 <= limit else num_tokens(text)
            if size <= limit:
                kept[name].append(item)
            else:
                reason = f"{size} tokens in {name}, the limit is {limit}"
                rejects.append(item.reject("too-long", reason))
    return require_enough(Corpus(kept, rejects), config)


def _longest_text(record: Any, config: RealConfig, templates: prompts.PromptSet) -> tuple[str, int]:
    """What a stage makes of the record, its prompt or its whole conversation; and the limit."""
    match record:
        case records.Demonstration():
            return record.user + record.assistant, config.max_example_tokens
        case records.Analysis():
            text = prompts.fill(
                templates.meta_verifier,
                statement=record.statement,
                proof=record.proof,
                analysis=record.text,
            )
        case records.Proof():
            text = prompts.fill(templates.verifier, statement=record.statement, proof=record.text)
        case _:
            text = prompts.fill(templates.generator, statement=record.statement)
    return text, config.max_prompt_tokens
