"""Several tokens in one sweep: somebody proposes, the model verifies, and the answer stays the model's own.

Moving the weights costs the same for one token as for many, so a model that waits for its bytes can
check a handful of proposed tokens in the time of one. What is chosen at each place is what the model
would have chosen alone: the same token when greedy, a token of the same distribution when sampling.
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
    probabilities
        ``[len(tokens), vocabulary]``: the distributions that they were drawn from; ``None`` when they
        were not drawn, but looked up or the most likely.
    grade
        Which of the proposer's kinds of proposal this is: they differ in how often they are right.
    """

    tokens: Sequence[int] = ()
    probabilities: Any = None
    grade: int = 0

    def first(self, count: int) -> Proposal:
        """The beginning of it."""
        if count >= len(self.tokens):
            return self
        rows = None if self.probabilities is None else self.probabilities[:count]
        return Proposal(self.tokens[:count], rows, self.grade)


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


def choose(scores: Any, do_sample: bool, proposed: int | None = None, drawn_from: Any = None) -> Any:
    """The next token of every row; that it equals ``proposed`` is what accepting means.

    A token that was drawn from ``drawn_from`` (q) is accepted with probability min(1, p/q), or else
    replaced by one from max(0, p - q), normalised (Leviathan et al. 2023; Chen et al. 2023). For a
    token that was not drawn q is 1 at one place: then drawing from p and comparing is the same
    thing, and uses the same random numbers as an answer without proposals.

    Parameters
    ----------
    scores
        ``[batch, vocabulary]`` float32: processed logits.
    proposed, drawn_from
        The token that was proposed, and its distribution ``[vocabulary]``. Only with a batch of 1.

    Returns
    -------
    Tensor
        ``[batch]`` int64.
    """
    import torch

    if not do_sample:
        return torch.argmax(scores, dim=-1)
    p = torch.softmax(scores, dim=-1)
    if proposed is not None and drawn_from is not None:
        q = drawn_from.to(p)
        if torch.rand((), device=p.device, generator=generator()) * q[proposed] < p[0, proposed]:
            return torch.tensor([proposed], device=p.device)
        rest = (p - q).clamp_(min=0)
        p = rest if rest.any() else p  # no rest: p and q are the same but for rounding
    return torch.multinomial(p, num_samples=1, generator=generator()).squeeze(1)
