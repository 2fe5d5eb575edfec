r"""Runs that no model wrote, to look at reports of: 20,000 records of LaTeX, and hostile texts.

    python -m tools.report_runs --workdir=DIR [--records=20000] [--hostile]

A run is a function of its seed. It has a generator's stage with verifiers and meta-verifiers,
labels of auto-labelling and of experts, a search with refinements, and metrics.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

from mathv2_jax import records, storage
from mathv2_jax.search import pool
from mathv2_jax.text import parse

GROUP = 8  # proofs of a problem in a step, and of a search's first round
ANALYSES = 6
STATEMENTS = (
    r"Let $p > {a}$ be a prime. Prove that $\sum_{{k=1}}^{{p-1}} k^{{{b}}} \equiv 0 \pmod p$"
    r" whenever $p - 1 \nmid {b}$.",
    r"Let $(x_n)_{{n \ge 1}}$ be a sequence of positive reals with"
    r" \[ x_{{n+1}} \le x_n + \frac{{{a}}}{{n^{{{b}}}}}. \] Show that $(x_n)$ converges.",
    r"Find all functions $f \colon \mathbb{{R}} \to \mathbb{{R}}$ such that"
    r" $$f(x + {a}y) + f(x - {b}y) = 2f(x) + \lvert y \rvert$$ for all real $x$, $y$.",
    r"In a triangle $ABC$ with incentre $I$, let $\angle BAC = {a}0^\circ$. Prove that"
    r" $\frac{{AI}}{{IA'}} = \frac{{b + c}}{{a}}$, where $A'$ is the foot of the bisector of $A$.",
    r"Show that every graph on $n \ge {a}{b}$ vertices with more than $\tfrac{{n^2}}{{4}}$ edges"
    r" contains at least $\lfloor n/2 \rfloor$ triangles.",
)
SENTENCES = (
    r"By the Cauchy–Schwarz inequality, $\left(\sum_{{i=1}}^n a_i b_i\right)^2 \le"
    r" \sum_{{i=1}}^n a_i^2 \sum_{{i=1}}^n b_i^2$, with equality only for $a_i = {a} b_i$.",
    r"Write $n = {a}m + r$ with $0 \le r < {a}$. Then"
    r" \[ n^{b} - r^{b} = {a}m \sum_{{j=0}}^{{{b}-1}} n^{{{b}-1-j}} r^j, \] which \(m\) divides.",
    r"Consider the generating function $$F(z) = \sum_{{n \ge 0}} \binom{{{a}n}}{{n}} z^n,"
    r" \qquad \lvert z \rvert < \tfrac{{1}}{{{b}{a}}}.$$",
    r"We argue by induction on $n$; the case $n = {b}$ is immediate from the hypothesis.",
    r"Suppose on the contrary that $x_{{{a}}} > x_{{{b}}}$. Then $f(x_{a}) - f(x_{b}) \ge"
    r" \varepsilon$, a contradiction with the choice of $\varepsilon$.",
    r"**Claim {a}.** The map $\varphi_{b} \colon \mathbb{{Z}}/p\mathbb{{Z}} \to"
    r" \mathbb{{Z}}/p\mathbb{{Z}}$, $t \mapsto t^{b}$, is injective if and only if"
    r" $\gcd({b}, p-1) = 1$.",
    r"\begin{{align*}} S_{{{a}}} &= \int_0^1 x^{{{a}}} (1-x)^{{{b}}} \, dx \\"
    r" &= \frac{{{a}!\,{b}!}}{{({a}+{b}+1)!}} . \end{{align*}}",
    r"Since $\det\begin{{pmatrix}} {a} & {b} \\ 1 & x \end{{pmatrix}} = {a}x - {b}$, the system"
    r" has a unique solution unless $x = \tfrac{{{b}}}{{{a}}}$.",
    r"Let $A' = \{{ k \le n : {a} \mid k \}}$; then $|A'| = \lfloor n/{a} \rfloor$ and the"
    r" remaining elements are paired by $k \leftrightarrow n - k$.",
    r"This proves the claim for all $n \ge {b}$, and hence the statement.",
)
FINDINGS = (
    r"The step to $x_{{{a}}}$ uses that $f$ is continuous, which was not shown.",
    r"The induction begins at $n = {b}$, but the step needs $n > {a}$: the case $n = {a}$ is open.",
    r"The bound $\lfloor n/{a} \rfloor$ is right and is used correctly.",
    r"Claim {a} is proved only for odd $p$; for $p = 2$ it is false.",
)


class Author:
    """Writes mathematics that looks real, and proves nothing."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)

    def filled(self, template: str) -> str:
        return template.format(a=self.rng.randint(2, 9), b=self.rng.randint(2, 9))

    def statement(self) -> str:
        return self.filled(self.rng.choice(STATEMENTS))

    def proof(self) -> list[str]:
        return [self.filled(self.rng.choice(SENTENCES)) for _ in range(self.rng.randint(6, 14))]

    def refined(self, proof: Sequence[str]) -> list[str]:
        """The proof with some sentences written anew, and one more."""
        kept = [
            s if self.rng.random() < 0.75 else self.filled(s_new) for s, s_new in self._pairs(proof)
        ]
        place = self.rng.randrange(len(kept))
        return [*kept[:place], self.filled(self.rng.choice(SENTENCES)), *kept[place:]]

    def _pairs(self, proof: Sequence[str]) -> Iterator[tuple[str, str]]:
        return ((sentence, self.rng.choice(SENTENCES)) for sentence in proof)

    def analysis(self, score: float) -> str:
        body = "\n\n".join(
            self.filled(self.rng.choice(FINDINGS)) for _ in range(self.rng.randint(1, 4))
        )
        return parse.write_analysis(body, score)

    def meta(self, score: float) -> str:
        return parse.write_meta_analysis(self.filled(self.rng.choice(FINDINGS)), score)

    def score(self, quality: float) -> float:
        """A score that tends to be high where `quality`, from 0 to 1, is."""
        return min(records.SCORES, key=lambda s: abs(s - self.rng.gauss(quality, 0.3)))


def sample(role: str, stage: str, name: str, **fields: Any) -> records.Sample:
    body: dict[str, Any] = dict(
        step=0,
        index=0,
        target="",
        proof="",
        analysis="",
        outcome=records.Outcome.PARSED,
        finish=records.Finish.STOP,
        checkpoint=f"{stage}@0",
    )
    body |= fields
    return records.Sample(
        id=name, role=role, stage=stage, num_tokens=len(body["text"]) // 3, **body
    )


class Run:
    """Records of a run, while they are made."""

    def __init__(self, seed: int):
        self.author = Author(seed)
        self.tables: dict[str, list[Any]] = {}
        self.problems: list[records.Problem] = []

    def size(self) -> int:
        return len(self.problems) + sum(map(len, self.tables.values()))

    def add(self, table: str, record: Any) -> None:
        self.tables.setdefault(table, []).append(record)

    def problem(self) -> records.Problem:
        statement = self.author.statement()
        made = records.Problem(
            id=records.content_id("problem", statement, str(len(self.problems))),
            statement=statement,
            source=self.author.rng.choice(("putnam", "imo", "usamo")),
            cluster=f"c{len(self.problems)}",
            reference="\n\n".join(self.author.proof()),
        )
        self.problems.append(made)
        return made

    def written(
        self, problem: records.Problem, stage: str, step: int, index: int, sentences: Sequence[str],
        **fields: Any,
    ) -> records.Sample:  # fmt: skip
        """A generator's sample with its analyses; now and then one that was cut."""
        author, name = self.author, f"{stage}/{problem.id}/{step}/{index}"
        own = author.score(0.8)
        text = parse.write_generation("\n\n".join(sentences), author.analysis(own))
        cut = author.rng.random() < 0.04
        asked: dict[str, Any] = dict(problem_id=problem.id, statement=problem.statement, step=step)
        if cut:
            text = text[: len(text) // 2]
            made = sample(
                "generator", stage, name, text=text, index=index, target=problem.id,
                outcome=records.Outcome.LENGTH, finish=records.Finish.LENGTH, **asked, **fields,
            )  # fmt: skip
            self.add(stage, made)
            return made
        quality = author.rng.random()
        votes = [author.score(quality) for _ in range(ANALYSES)]
        mean = sum(votes) / len(votes)
        meta, honesty = author.score(0.7), 1.0 - abs(own - mean)
        rewards = {"format": 1.0, "proof": mean, "self": honesty, "meta": meta}
        rewards |= {"honesty": honesty * meta, "total": 0.76 * mean + 0.24 * honesty * meta}
        made = sample(
            "generator", stage, name, text=text, index=index, target=problem.id, score=own,
            rewards=rewards if stage != "search" else {}, **asked, **fields,
            advantage=rewards["total"] - 0.5 if stage != "search" else None,
        )  # fmt: skip
        self.add(stage, made)
        for number, vote in enumerate(votes):
            self.add(
                stage,
                sample(
                    "verifier", stage, f"{name}/{number}", text=author.analysis(vote), score=vote,
                    index=number, target=name, proof="\n\n".join(sentences), **asked,
                ),
            )  # fmt: skip
        if stage != "search":
            self.add(
                stage,
                sample(
                    "meta_verifier", stage, f"{name}/meta_verifier/0", text=author.meta(meta),
                    score=meta, target=name, proof="\n\n".join(sentences), **asked,
                ),
            )  # fmt: skip
        return made

    def trained(self, problem: records.Problem, step: int) -> None:
        """A group of a generator's step; the first proof is labelled, sometimes twice."""
        for index in range(GROUP):
            sentences = self.author.proof()
            made = self.written(problem, "generator-1", step, index, sentences)
            if index == 0 and made.score is not None:
                self._labelled(made, "\n\n".join(sentences))

    def _labelled(self, made: records.Sample, text: str) -> None:
        votes = tuple(self.author.score(0.5) for _ in range(4))
        auto = records.Label(
            score=min(votes), source="auto", scale="auto", rater="verifier-1", votes=votes
        )
        person = records.Label(
            score=self.author.score(0.5),
            source="human",
            rater="A. N.",
            comment=self.author.filled(FINDINGS[0]),
        )
        proof = records.Proof(
            id=records.content_id("proof", made.statement, text),
            problem_id=made.problem_id,
            statement=made.statement,
            text=text,
            parents=(made.id,),
            label=auto,
        )
        self.add("autolabel-1", proof)
        if self.author.rng.random() < 0.4:
            self.add("experts-1", dataclasses.replace(proof, label=person))

    def searched(self, problem: records.Problem, rounds: int) -> None:
        """A search of a problem: proofs, and refinements of the best of them."""
        proofs = [self.author.proof() for _ in range(GROUP)]
        made = [self.written(problem, "search", 0, i, p) for i, p in enumerate(proofs)]
        for step in range(1, rounds + 1):
            best = self.author.rng.sample(range(len(made)), 4)
            fresh = [self.author.refined(proofs[at]) for at in best]
            for index, at in enumerate(best):
                shown, text = made[at], "\n\n".join(proofs[at])
                analysis = self.author.analysis(0.5)
                parents = (shown.id, f"{shown.id}/0")
                made.append(
                    self.written(
                        problem, "search", step, index, fresh[index],
                        proof=text, analysis=analysis, parents=parents,
                    )
                )  # fmt: skip
            proofs += fresh

    def write(self, workdir: pathlib.Path) -> None:
        storage.write_whole(
            workdir / "records" / "input" / "problems.jsonl", records.to_lines(self.problems)
        )
        for name, table in self.tables.items():
            parts = storage.Parts(workdir / "records" / name)
            parts.write_part(storage.part_name(1), records.to_lines(table))
            parts.commit(1)
        config = {
            "method": "pool",
            "seed": 0,
            "pool": dataclasses.asdict(pool.PoolConfig(rounds=3)),
        }
        storage.write_whole(workdir / "config.json", json.dumps({"search": config}).encode())
        lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in curves(400))
        storage.write_whole(workdir / "metrics.jsonl", lines.encode())


# A scalar's value at first and in the end, and its noise.
SUPERVISED = {
    "gradient_norm": (3.0, 0.6, 0.1),
    "learning_rate": (1e-3, 1e-5, 0.0),
    "loss": (5.1, 0.9, 0.06),
}
REWARDED = {
    "entropy": (0.9, 0.42, 0.02),
    "gradient_norm": (0.8, 0.3, 0.05),
    "kl": (1e-5, 3e-3, 1e-4),
    "learning_rate": (1e-5, 1e-5, 0.0),
    "length": (310.0, 742.0, 12.0),
    "outcome/length": (0.11, 0.02, 0.01),
    "outcome/parsed": (0.86, 0.98, 0.01),
    "reward": (0.31, 0.63, 0.03),
    "reward/meta": (0.5, 0.81, 0.03),
    "reward/proof": (0.28, 0.58, 0.03),
    "reward/self": (0.55, 0.84, 0.03),
    "tokens": (1.1e6, 2.6e6, 3e4),
}


def curves(steps: int) -> Iterator[dict[str, Any]]:
    """What two stages may have measured."""
    noise = random.Random(0)
    for stage, scalars in (("sft", SUPERVISED), ("generator-1", REWARDED)):
        for step in range(1, steps + 1):
            left = math.exp(-3 * step / steps)
            row = {
                name: end + (first - end) * left + noise.gauss(0, 1) * width
                for name, (first, end, width) in scalars.items()
            }
            yield {"stage": stage, "step": step, **row}


def make(workdir: pathlib.Path, size: int, seed: int = 0) -> int:
    """A run of about `size` records; how many there are."""
    run, turn = Run(seed), 0
    while run.size() < size:
        problem, turn = run.problem(), turn + 1
        if turn % 8 == 0:
            run.searched(problem, rounds=3)
        else:
            run.trained(problem, step=turn // 4)
    run.write(workdir)
    return run.size()


# What a hostile model, file or label might hold. Whatever of it is carried out sets `window.pwned`,
# opens a dialog, asks for a file, or leaves an element that the page never makes.
HOSTILE = (
    "<script>window.pwned = 1; alert(1)</script>",
    "</script><script>window.pwned = 1; alert(1)</script>",
    "<img src=x onerror='window.pwned = 1; alert(1)'>",
    "<svg onload='window.pwned = 1'><animate onbegin='window.pwned = 1'/></svg>",
    "<a href='javascript:window.pwned = 1'>proof</a> [proof](javascript:window.pwned=1)",
    "<iframe srcdoc='<script>parent.pwned = 1</script>'></iframe><base href='https://evil.example/'>",
    "<style>body { display: none }</style><link rel=stylesheet href='https://evil.example/x.css'>",
    r"\(\href{javascript:window.pwned=1}{x}\) $\url{javascript:window.pwned=1}$",
    r"\[\htmlId{main}{x}\] $\htmlStyle{position:fixed}{x}$ $\htmlData{a=1}{x}$ $\htmlClass{top}{}$",
    r"$\includegraphics{https://evil.example/x.png}$ $\def\a{\a\a}\a$ $\rule{9999em}{9999em}$",
    r"$\raisebox{900pt}{\Huge score 1}$ $\hspace{-9999em} x$ " + "$" + "{" * 3000 + "x" + "$",
    "]); window.pwned = 1; report.accept('index', '', [",
    "\u2028window.pwned = 1\u2029 \ud800 \u202eesrever \x00",
    "__proto__",
    "constructor",
    "<![CDATA[ <!--<script> --> ]]> &lt;script&gt; {{constructor.constructor('pwned=1')()}}",
    "%3Cscript%3E/../../#/proofs?q=x&kinds=above",
)


def make_hostile(workdir: pathlib.Path) -> list[str]:
    """A run in which every text, id and name is one of HOSTILE; its proofs' ids."""
    problems, found, last = [], [], HOSTILE[-1]
    for text in HOSTILE:
        body = f"{text}\n\n{text} and $x$ {text}"
        generation = f"## Solution\n{body}\n\n## Self Evaluation\n{parse.write_analysis(body, 1.0)}"
        asked: dict[str, Any] = dict(
            problem_id=text, statement=body, checkpoint=text, rewards={text: 0.5, "total": 0.5}
        )
        problem = records.Problem(id=text, statement=body, source=text, cluster=text, answer=text)
        problems.append(problem)
        proof = sample(
            "generator", text, text, text=generation, score=1.0, target=text,
            proof=last, analysis=body, parents=(last,), thinking=body, **asked,
        )  # fmt: skip
        analysis = sample(
            "verifier", text, f"{text}/0", text=parse.write_analysis(body, 0.0), score=0.0,
            target=text, thinking=body, **asked,
        )  # fmt: skip
        meta = sample("meta_verifier", text, f"{text}/0/0", text=body, target=f"{text}/0", **asked)
        label = records.Label(
            score=0.5, source="human", rater=text, comment=body, scale=text, rubric=text
        )
        labelled = records.Proof(
            id=f"p{text}", problem_id=text, statement=body, text=text, parents=(text,), label=label
        )
        found += [proof, analysis, meta, labelled]
        last = text
    storage.write_whole(
        workdir / "records" / "input" / "problems.jsonl", records.to_lines(problems)
    )
    parts = storage.Parts(workdir / "records" / "hostile")
    parts.write_part(storage.part_name(1), records.to_lines(found))
    parts.commit(1)
    rows = [{"stage": text, "step": step, text: float(step)} for text in HOSTILE for step in (1, 2)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    storage.write_whole(workdir / "metrics.jsonl", lines.encode())
    return list(HOSTILE)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--workdir", type=pathlib.Path, required=True)
    asked.add_argument("--records", type=int, default=20_000)
    asked.add_argument("--hostile", action="store_true")
    given = asked.parse_args()
    if given.hostile:
        make_hostile(given.workdir)
    else:
        print(f"{make(given.workdir, given.records):,} records")


if __name__ == "__main__":
    main()
