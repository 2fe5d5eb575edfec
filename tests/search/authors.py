"""An engine without a model: it writes proofs of some level and verifies them by it.

A proof reads `Proof 3.c0ffee of X`: its level, 0 to 9, and a mark that tells it from others. A vote
is 1 with a probability that grows with the level. Refinement raises the level by one, or does not.
"""

import hashlib
import re

from mathv2_jax import records, roles
from mathv2_jax.text import parse

SAMPLING = roles.Sampling(max_tokens=64)
ROLES = roles.make_roles(
    roles.RolesConfig(
        templates="world", generator=SAMPLING, verifier=SAMPLING, meta_verifier=SAMPLING
    )
)
_PROOF = re.compile(r"Proof (\d)\.")


class Killed(BaseException):
    pass


class Author:
    """Seeded, unless `moody`: then no answer is ever the same again. Dies after `most` answers.

    `asked` has the key of every answer that was written. Shares of answers are `lost`, cut or
    unreadable.
    """

    version = "author"
    tokenizer = None

    def __init__(self, *, moody=False, most=10**9, lost=0.0, unreadable=0.1, levels=4):
        self.moody, self.most, self.lost, self.unreadable = moody, most, lost, unreadable
        self.levels = levels  # of first proofs
        self.asked = []

    def generate(self, requests, on_answer=None, *, answered=()):
        found = []
        for place, request in enumerate(requests):
            responses = []
            for index in range(request.num_samples):
                if (place, index) in answered:
                    continue
                if len(self.asked) >= self.most:
                    raise Killed
                self.asked.append((request.id, index))
                responses.append(self._answer(request, index))
                if on_answer is not None:
                    on_answer(place, responses[-1])
            found.append(responses)
        return found

    def _draw(self, request, index, *purpose):
        mood = len(self.asked) if self.moody else 0
        text = repr((request.seed, index, request.messages, purpose, mood))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48

    def _answer(self, request, index):
        (_, prompt), chance = request.messages[-1], self._draw(request, index)
        levels = [int(level) for level in _PROOF.findall(prompt)]
        if prompt.endswith("Evaluate it."):
            text = self._analysis(request, index, levels[-1])
        else:
            better = self._draw(request, index, "better") < 0.5
            level = min(9, max(levels) + better) if levels else int(self.levels * chance)
            text = self._proof(request, index, level)
        finish = records.Finish.STOP
        ending = self._draw(request, index, "ending")
        if ending < self.lost:
            finish, text = records.Finish.LOST, ""
        elif ending < self.lost + self.unreadable:
            text = text.replace("boxed", "box")
        return records.Response(
            request_id=request.id,
            index=index,
            token_ids=(),
            logprobs=(),
            text=text,
            final_text=text,
            thinking_text="a thought",
            finish=finish,
            parameter_version=self.version,
            counted_tokens=len(text),
        )

    def _analysis(self, request, index, level):
        chance = self._draw(request, index, "vote")
        score = 1.0 if chance < level / 9 else 0.5 if chance < (level + 2) / 9 else 0.0
        body = "All is well." if score == 1.0 else f"Doubt {int(1e6 * chance)}."
        return parse.write_analysis(body, score)

    def _proof(self, request, index, level):
        mark = int(1e6 * self._draw(request, index, "mark"))
        own = (0.0, 0.5, 1.0)[int(3 * self._draw(request, index, "self"))]
        analysis = parse.write_analysis("I think so.", own)
        return parse.write_generation(f"Proof {level}.{mark} of it", analysis)


def problem(name="p"):
    return records.Problem(id=name, statement=f"Show {name}.", source="test", cluster=name)
