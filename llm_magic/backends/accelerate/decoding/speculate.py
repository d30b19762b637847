"""Several tokens in one sweep: somebody proposes, the model verifies, and the answer stays the model's own.

Moving the weights costs the same for one token as for many, so a model that waits for its bytes can
check a handful of proposed tokens in the time of one. What is chosen at each place is what the model
would have chosen alone, by the same random numbers: so an answer is repeated by its seed, however many
tokens were proposed, which depends on the clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llm_magic.backends.accelerate.decoding.pace import Pace
from llm_magic.backends.accelerate.decoding.sampling import generator


@dataclass(frozen=True)
class Proposal:
    """Tokens that may come next.

    Attributes
    ----------
    tokens
        Their ids, in order.
    grade
        Which of the proposer's kinds of proposal this is: they differ in how often they are right.
    """

    tokens: Sequence[int] = ()
    grade: int = 0

    def first(self, count: int) -> Proposal:
        """The beginning of it."""
        return self if count >= len(self.tokens) else Proposal(self.tokens[:count], self.grade)


class Proposer(Protocol):
    """Guesses how an answer goes on.

    ``priors`` has for each grade the share of tokens that is expected to be right before there is
    experience.
    """

    @property
    def priors(self) -> Sequence[float]:
        """One for each grade."""

    def begin(self, ids: list[int], processors: Sequence[Any] | None, device: Any) -> None:
        """A new answer to the prompt ``ids``; called after it was read.

        ``processors`` are the logits processors by which tokens are sampled on ``device``; ``None``
        when the choice is greedy.
        """

    def propose(self, ids: list[int], most: int) -> Proposal:
        """At most ``most`` tokens to follow ``ids``, which has grown since the last call."""


class Speculation:
    """A proposer with the pace at which it is worth listening to.

    Parameters
    ----------
    proposer
        Where proposals come from.
    pace
        How long they should be. Keep one per loaded model: the times of its sweeps stay true from
        answer to answer.
    """

    def __init__(self, proposer: Proposer, pace: Pace) -> None:
        self.proposer = proposer
        self.pace = pace

    def begin(self, ids: list[int], processors: Sequence[Any] | None, device: Any) -> None:
        """A new answer."""
        self.pace.begin(self.proposer.priors)
        self.proposer.begin(ids, processors, device)

    def propose(self, ids: list[int], room: int) -> Proposal:
        """What to verify with the next sweep; ``room`` is how many tokens there may be at most."""
        most = self.pace.longest(room)
        if not most:
            return Proposal()
        proposal = self.proposer.propose(ids, most)
        return proposal.first(self.pace.length(proposal.grade, min(len(proposal.tokens), most)))


def choose(scores: Any, do_sample: bool) -> Any:
    """The next token of every row.

    torch draws by exponential noise ``e``: the token with the largest ``p / e``. Who proposes tokens draws by the same
    numbers (see `sampling.drawn_ahead`), so that both tend to choose the same, and what is chosen here does not
    depend on what was proposed. (Maddison et al. 2014; as a coupling: Daliri et al. 2025, "Coupling without
    communication": at least ``(1 - d) / (1 + d)`` of the tokens are the same, for a distance ``d`` between the
    distributions.)

    Parameters
    ----------
    scores
        ``[batch, vocabulary]`` float32: processed logits.

    Returns
    -------
    Tensor
        ``[batch]`` int64.
    """
    import torch

    if not do_sample:
        return torch.argmax(scores, dim=-1)
    p = torch.softmax(scores, dim=-1)
    return torch.multinomial(p, num_samples=1, generator=generator()).squeeze(1)
