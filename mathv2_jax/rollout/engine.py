"""The engine: requests in, responses out, by continuous batching over pages.

An engine is bound to one parameter set. A fixed number of rows is decoded together, some tokens at
a time; in between, rows that are done make room for answers that wait. Prompts are computed into
pages first, which all answers to them share, and all prompts that begin alike. What an answer's
tokens are depends on no other request, but for the last bits of log-probabilities where another is
truncated: that takes another compiled program.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
from absl import logging
from jax.sharding import Mesh

from mathv2_jax import records, sharding
from mathv2_jax.model import transformer
from mathv2_jax.rollout import answers, decode, schedule, worker
from mathv2_jax.text import tokenizer as tokenizer_lib

OnAnswer = Callable[[int, records.Response], None]  # (the request's place, an answer to it)


@dataclasses.dataclass
class Stats:
    """What an engine has done since it was made, and how well its rows were used."""

    prompt_tokens: int = 0  # of prompts, once for each request
    computed_tokens: int = 0  # those of them that were in no page yet
    answer_tokens: int = 0
    steps: int = 0
    row_steps: int = 0  # of all rows, in use or not
    restarted: int = 0  # answers that gave up their pages to older ones, to begin again

    @property
    def row_use(self) -> float:
        """Share of the decoded rows that drew a token that counts."""
        return self.answer_tokens / self.row_steps if self.row_steps else 0.0


class Engine:
    """Answers requests with the variables last given to `load`; see the module's text.

    `think` says whether answers begin inside thinking, which decides `final_text`.
    """

    def __init__(
        self,
        programs: decode.Programs,
        tokenizer: tokenizer_lib.Tokenizer,
        engine_config: schedule.EngineConfig,
        mesh: Mesh,
        *,
        think: bool = False,
    ):
        self.tokenizer, self.limits = tokenizer, engine_config
        self.mesh, self.think = mesh, think
        self.stats = Stats()
        self._worker = worker.Worker(programs, engine_config, mesh, tokenizer.pad_id)
        self.abstract, self.shardings = self._worker.abstract, self._worker.shardings
        sizes = self._worker.sizes
        self.pools = tuple(
            schedule.Pool(sizes.pages_a_part, engine_config.page) for _ in range(sizes.parts)
        )
        self._version = ""
        self._cancelled: set[str] = set()
        self._recorded = False
        # Where prompts' tokens were sent, by page: [slots, layers, a token's] of what is computed.
        self._sent: list[dict[int, np.ndarray]] = [{} for _ in self.pools]

    def load(self, variables: transformer.Variables, version: str) -> None:
        """Answer with these variables from now on; `version` is written into every response.

        They are JAX arrays on the devices of the engine's mesh, however they lie there. What pages
        hold of prompts is of the variables before, and counts no more.
        """
        self._worker.load(variables)
        self._version = version
        self._forget()

    def unload(self) -> None:
        """Let go of the variables and of the pages."""
        self._worker.unload()
        self._forget()

    def _forget(self) -> None:
        for pool, sent in zip(self.pools, self._sent, strict=True):
            pool.forget()
            sent.clear()

    def cancel(self, request_id: str) -> None:
        """Leave a request's answers, in the `generate` that goes on or in the next, where they are
        not complete; an id that is in neither is forgotten.

        From any thread, in any one process of the engine's mesh.
        """
        self._cancelled.add(request_id)

    def generate(
        self,
        requests: Sequence[records.Request],
        on_answer: OnAnswer | None = None,
        *,
        experts: bool = False,
        kept: bool = False,
        answered: Collection[tuple[int, int]] = (),
    ) -> list[list[records.Response]]:
        """`num_samples` responses for each request, in the requests' order.

        `on_answer` is told of each when it is complete. ValueError before the first `load`. A
        request that does not fit comes back LOST, one that was cancelled in time CANCELLED.
        `experts` and `kept` ask for the experts that tokens were sent to, and for what truncation
        left of each token's distribution; asking for experts on and off between two loads computes
        prompts again. `answered` are (place, index) that are answered already and left out.
        """
        before = set(self._cancelled)
        experts = experts and self._worker.programs.config.num_sparse_layers > 0
        if experts != self._recorded:
            self._forget()
            self._recorded = experts
        found: dict[tuple[int, int], records.Response] = {}

        def done(place: int, response: records.Response) -> None:
            found[place, response.index] = response
            if on_answer is not None:
                on_answer(place, response)

        waiting = collections.deque[tuple[int, int]]()
        complaints = list[str]()
        for place, request in enumerate(requests):
            complaint = schedule.complaint(self.limits, request, self._stop_ids(request))
            if complaint:
                complaints.append(f"request {request.id} is lost: {complaint}")
            for index in range(request.num_samples):
                if (place, index) in answered:
                    continue
                if complaint:
                    done(place, self._unanswered(request, index, records.Finish.LOST))
                else:
                    waiting.append((place, index))
        if complaints:
            more = f"; so are {len(complaints) - 1:,} more of {len(requests):,}"
            logging.warning("%s%s", complaints[0], more if len(complaints) > 1 else "")
        rows = _Rows(self, requests, waiting, done, kept)
        with self._sound_pages():
            try:
                while rows.going():
                    rows.turn()
            finally:
                rows.leave()
                # An id that nobody asked about is not kept for ever.
                self._cancelled -= before | {request.id for request in requests}
        return [
            [found[p, i] for i in range(r.num_samples) if (p, i) in found]
            for p, r in enumerate(requests)
        ]

    def first_opinions(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """The verifier head's P(0), P(0.5), P(1) at the end of each prompt: [prompts, 3].

        ValueError names a prompt that is empty or does not fit.
        """
        for at, prompt in enumerate(prompts):
            if not 1 <= len(prompt) <= self.limits.context:
                raise ValueError(
                    f"prompt {at} has {len(prompt)} tokens: it must have 1 to engine.context = "
                    f"{self.limits.context}"
                )
        opinions = np.zeros((len(prompts), 3), np.float32)
        with self._sound_pages():
            self._first_opinions(prompts, opinions)
        return opinions

    @contextlib.contextmanager
    def _sound_pages(self) -> Iterator[None]:
        """Where the block fails, what pages hold is not known: nothing of it is used again."""
        try:
            yield
        except BaseException:
            self._worker.forget()
            self._forget()
            raise

    def _first_opinions(self, prompts: Sequence[Sequence[int]], opinions: np.ndarray) -> None:
        left = collections.deque(enumerate(prompts))
        while left:
            held: dict[int, tuple[schedule.Pool, list[int], int]] = {}
            queues: list[list[schedule.Piece]] = [[] for _ in self.pools]
            while left:
                at, prompt = left[0]
                part = at % len(self.pools)
                pages = self.pools[part].take_all(-(-len(prompt) // self.limits.page))
                if pages is None:
                    break
                left.popleft()
                held[id(pages)] = (self.pools[part], pages, at)
                queues[part] += schedule.pieces(prompt, pages, 0, self.limits.chunk)
            try:
                for found in self._compute(queues):
                    if found.piece.end == len(found.piece.prompt):
                        opinions[held[id(found.piece.pages)][2]] = found.head_3
            finally:
                for pool, pages, _ in held.values():
                    pool.give_all(pages)

    def _stop_ids(self, request: records.Request) -> tuple[int, ...]:
        return tuple(sorted({*self.tokenizer.stop_ids, *request.stop_ids}))

    def _compute(self, queues: Sequence[Sequence[schedule.Piece]]) -> list[worker.Computed]:
        found = list(self._worker.compute(queues, experts=self._recorded))
        for part, piece, _, sent_TLA in found:
            self.stats.computed_tokens += piece.end - piece.begin
            if sent_TLA is not None:
                self._note(part, piece, sent_TLA)
        return found

    def _note(self, part: int, piece: schedule.Piece, sent_TLA: np.ndarray) -> None:
        """Where the tokens of a piece were sent, beside the pages that they are in."""
        size, sent = self.limits.page, self._sent[part]
        for at in range(piece.begin, piece.end):
            page = piece.pages[at // size]
            if page not in sent:
                sent[page] = np.zeros((size, *sent_TLA.shape[1:]), np.int16)
            sent[page][at % size] = sent_TLA[at - piece.begin]

    def _sent_of(self, answer: answers.Answer) -> np.ndarray:
        """Where the prompt's tokens but the last were sent: [tokens, layers, a token's]."""
        sent = [self._sent[answer.part][page] for page in answer.lease.pages]
        if not sent:
            return np.zeros((0, *answer.experts[0].shape), np.int16)
        return np.concatenate(sent)[: answer.lease.length]

    def _response(self, answer: answers.Answer, finish: records.Finish) -> records.Response:
        token_ids = tuple(answer.tokens)
        self.stats.answer_tokens += len(token_ids)
        thinking, final = self.tokenizer.split_thinking(token_ids, think=self.think)
        return records.Response(
            request_id=answer.request.id,
            index=answer.index,
            token_ids=token_ids,
            logprobs=tuple(answer.logprobs),
            policy_logprobs=tuple(answer.policy_logprobs),
            text=self.tokenizer.decode(token_ids),
            final_text=None if final is None else self.tokenizer.decode(final),
            thinking_text=self.tokenizer.decode(thinking),
            finish=finish,
            parameter_version=self._version,
            experts=records.Ints.of(np.stack(answer.experts)) if answer.experts else None,
            prompt_experts=records.Ints.of(self._sent_of(answer)) if answer.experts else None,
            kept=tuple(answer.kept) if answer.kept else None,
        )

    def _unanswered(
        self, request: records.Request, index: int, finish: records.Finish
    ) -> records.Response:
        return answers.unanswered(request, index, finish, self._version)


class _Rows:
    """The rows during one `generate`: who is in them, and who waits."""

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[records.Request],
        waiting: collections.deque[tuple[int, int]],
        done: OnAnswer,
        kept: bool,
    ):
        self._kept = kept
        self._engine, self._requests, self._waiting, self._done = engine, requests, waiting, done
        self._worker, self._limits = engine._worker, engine.limits
        sizes = self._worker.sizes
        self._rows: list[answers.Answer | None] = [None] * sizes.rows
        self._room = max(1, sizes.rows // 8)  # rows that are filled again together
        self._begun: set[int] = set()  # requests whose prompt was counted

    def going(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._waiting) or any(self._rows)

    def turn(self) -> None:
        """Fill free rows, draw some tokens, and let go of what is complete."""
        self._leave_cancelled()
        if not self.going():
            return
        active = sum(a is not None for a in self._rows)
        if self._waiting and len(self._rows) - active >= min(self._room, len(self._waiting)):
            self._admit()
        self._make_room()
        active = sum(a is not None for a in self._rows)
        least = max(1, active - self._room + 1) if self._waiting else 1
        drawn = self._worker.advance(
            self._rows, least, experts=self._engine._recorded, kept=self._kept
        )
        steps = int(drawn.count_B.max())
        self._engine.stats.steps += steps
        self._engine.stats.row_steps += steps * len(self._rows)
        for row, answer in enumerate(self._rows):
            if answer is not None:
                self._take_over(row, answer, drawn)

    def leave(self) -> None:
        """Give all pages back."""
        for row, answer in enumerate(self._rows):
            if answer is not None:
                self._release(row, answer)

    def _release(self, row: int, answer: answers.Answer) -> None:
        pool = self._engine.pools[answer.part]
        pool.give_all(answer.own)
        pool.release(answer.lease)
        self._rows[row] = None

    def _leave_cancelled(self) -> None:
        flags = np.array([r.id in self._engine._cancelled for r in self._requests])
        flags = sharding.any_of(flags, self._engine.mesh)
        if not flags.any():
            return
        left = records.Finish.CANCELLED
        for row, answer in enumerate(self._rows):
            if answer is not None and flags[answer.place]:
                self._release(row, answer)
                found = self._engine._unanswered(answer.request, answer.index, left)
                self._done(answer.place, found)
        kept = collections.deque[tuple[int, int]]()
        for place, index in self._waiting:
            if flags[place]:
                self._done(place, self._engine._unanswered(self._requests[place], index, left))
            else:
                kept.append((place, index))
        self._waiting = kept

    def _admit(self) -> None:
        """Answers that wait into free rows, in order, and their prompts into pages."""
        queues: list[list[schedule.Piece]] = [[] for _ in self._engine.pools]
        free = self._free_rows()
        wanted = [0] * len(queues)  # pages by part, for one turn of those that are in it
        for answer in filter(None, self._rows):
            wanted[answer.part] += self._pages_wanted(answer)
        while self._waiting:
            place, index = self._waiting[0]
            part = self._part_for(self._requests[place], free)
            answer = None if part is None else self._begin(place, index, part, wanted[part])
            if part is None or answer is None:
                break
            self._waiting.popleft()
            self._rows[free[part].pop()] = answer
            wanted[part] += self._pages_wanted(answer)
            prompt = self._requests[place].prompt[: answer.lease.length]
            queues[part] += schedule.pieces(
                prompt, answer.lease.pages, answer.lease.start, self._limits.chunk
            )
            if place not in self._begun:
                self._begun.add(place)
                self._engine.stats.prompt_tokens += len(self._requests[place].prompt)
        if any(queues):
            self._engine._compute(queues)

    def _free_rows(self) -> list[list[int]]:
        """By part, the first one last."""
        each = self._worker.sizes.rows_a_part
        return [
            [row for row in reversed(range(p * each, (p + 1) * each)) if self._rows[row] is None]
            for p in range(len(self._engine.pools))
        ]

    def _part_for(self, request: records.Request, free: Sequence[Sequence[int]]) -> int | None:
        """A part with a free row: one that has the request's prompt, else the one with most."""
        candidates = [part for part, rows in enumerate(free) if rows]
        if not candidates:
            return None
        has = [pool.has(request.prompt[:-1]) for pool in self._engine.pools]
        return max(candidates, key=lambda part: (has[part], len(free[part]), -part))

    def _pages_wanted(self, answer: answers.Answer) -> int:
        """For one turn more."""
        drawn = len(answer.tokens) + self._limits.steps
        return answer.pages_at(drawn, self._limits.page) - len(answer.own)

    def _begin(self, place: int, index: int, part: int, others: int) -> answers.Answer | None:
        """The answer with its prompt's pages; None where these are not to be had now.

        An answer that is let in leaves pages for every row of its part to go on for one turn: the
        `others` want so many.
        """
        request, pool = self._requests[place], self._engine.pools[part]
        lease = pool.lease(request.prompt[:-1])
        if lease is None:
            return None
        answer = answers.Answer(
            place=place,
            index=index,
            request=request,
            stop_ids=self._engine._stop_ids(request),
            part=part,
            lease=lease,
            key=answers.row_key(request.seed, index),
        )
        short = pool.available < others + self._pages_wanted(answer)
        if short and any(a is not None and a.part == part for a in self._rows):
            pool.undo(lease)
            return None
        return answer

    def _make_room(self) -> None:
        """Pages for the tokens of a turn; where there are none, the youngest answers give way."""
        for row, answer in enumerate(self._rows):
            while answer is not None and self._rows[row] is answer:
                pages = self._engine.pools[answer.part].take_all(self._pages_wanted(answer))
                if pages is not None:
                    answer.own += pages
                    break
                self._put_back(answer.part)

    def _put_back(self, part: int) -> None:
        """The last request's last answer of a part waits again, and will begin again."""
        row, youngest = max(
            ((row, a) for row, a in enumerate(self._rows) if a is not None and a.part == part),
            key=lambda pair: (pair[1].place, pair[1].index),
        )
        self._release(row, youngest)
        self._waiting.appendleft((youngest.place, youngest.index))
        self._engine.stats.restarted += 1

    def _take_over(self, row: int, answer: answers.Answer, drawn: decode.Drawn) -> None:
        """What a row drew; the answer leaves it where that completes it."""
        first = len(answer.tokens)
        answer.extend(drawn, row, kept=self._kept)
        stopped = answer.cut(self._engine.tokenizer, first) or bool(drawn.stopped_B[row])
        if stopped or len(answer.tokens) >= answer.request.max_tokens:
            finish = records.Finish.STOP if stopped else records.Finish.LENGTH
            response = self._engine._response(answer, finish)
            self._release(row, answer)
            self._done(answer.place, response)
