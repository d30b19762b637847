"""Speculation changes how fast an answer comes, never what it is."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llm_magic.backends.accelerate.decoding.decode import Decoding
from llm_magic.backends.accelerate.decoding.pace import LENGTHS, Pace
from llm_magic.backends.accelerate.decoding.proposers import DraftModel, PromptLookup, require_same_vocabulary
from llm_magic.backends.accelerate.decoding.sampling import drawn_ahead, seeded
from llm_magic.backends.accelerate.decoding.speculate import Proposal, Speculation, choose
from llm_magic.errors import OptionError
from tests import tiny
from tests.caches import given
from tests.test_decode import (
    DECODERS,
    SAMPLED,
    Gathered,
    NoRoom,
    answer,
    decoder_layers,
    eager_pace,
    fails_at,
    lengths,
    new_cache,
    parrot,
)

TinyModel = Callable[[str], Path]
PROMPTS = (
    "The capital of France is Paris, and",
    "one two three one two three one two",
    "def square(x):\n    return x * x\n\n\ndef square(x):",
)


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> Callable[[str], Any]:
    from transformers import AutoModelForCausalLM

    models: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in models:
            models[name] = AutoModelForCausalLM.from_pretrained(tiny_model(name)).eval()
        return models[name]

    return load


@pytest.fixture(scope="module")
def prompts(tiny_model: TinyModel) -> list[Any]:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    return [torch.tensor([tokenizer(text).input_ids]) for text in PROMPTS]


@pytest.fixture(scope="module")
def stock(model: Callable[[str], Any], prompts: list[Any]) -> Callable[..., list[int]]:
    """``stock("llama", 0, **options)``: prompt and answer by transformers' own loop, made once."""
    return cache(lambda name, text, **options: answer(model(name), prompts[text], **options)[0])


def lookup() -> Speculation:
    return Speculation(PromptLookup(), eager_pace())


# --------------------------------------------------------------------------- the same greedy answer


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("text", range(len(PROMPTS)))
@pytest.mark.parametrize("choice", [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 3}])
def test_a_greedy_answer_is_the_same_with_prompt_lookup(
    name: str, text: int, choice: dict[str, Any], model: Callable[[str], Any], prompts: list[Any]
) -> None:
    wanted = answer(model(name), prompts[text], max_new_tokens=60, **choice)
    decoding = Decoding(Gathered(), speculation=lookup())
    assert answer(model(name), prompts[text], decoding, max_new_tokens=60, **choice) == wanted
    assert decoding.counts.proposed > 0


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("wrong", [0, 1, 2, 3, 5, 7])
@pytest.mark.parametrize("choice", [{}, {"repetition_penalty": 1.3}, SAMPLED])
def test_right_and_wrong_proposals_in_every_pattern(
    name: str,
    wrong: int,
    choice: dict[str, Any],
    model: Callable[[str], Any],
    prompts: list[Any],
    stock: Callable[..., list[int]],
) -> None:
    """Sampled too: proposals that were not drawn use the random numbers of an answer without them."""
    options = {"max_new_tokens": 40, "eos_token_id": None} | choice
    wanted = stock(name, 0, **options)
    decoding, cache = Decoding(Gathered(), speculation=parrot(wanted, wrong)), new_cache(model(name))
    tokens = answer(model(name), prompts[0], decoding, **given(cache), **options)
    assert tokens == [wanted]
    assert lengths(cache) == {len(wanted) - 1}
    generated = len(wanted) - prompts[0].shape[1]
    assert generated == 40
    assert decoding.counts.sweeps + decoding.counts.accepted == generated - 1
    assert (decoding.counts.accepted > 0) == (wrong != 1)
    assert (decoding.counts.accepted == decoding.counts.proposed) == (wrong == 0)
    assert [token for (token,) in decoding.streamer.steps] == wanted[-generated:]


@pytest.mark.parametrize("wrong", [0, 1, 3])
@pytest.mark.parametrize("do_sample", [False, True])
def test_every_token_is_processed_once_with_all_that_is_before_it(
    wrong: int, do_sample: bool, model: Callable[[str], Any], prompts: list[Any]
) -> None:
    """Processors with a memory, as watermarks have, would notice."""
    seen: list[list[int]] = []

    def note(ids: Any, scores: Any) -> Any:
        seen.append(ids[0].tolist())
        return scores

    options = {"do_sample": do_sample, "eos_token_id": None, "logits_processor": [note]}
    (wanted,) = answer(model("llama"), prompts[0], **options)
    alone = list(seen)
    seen.clear()
    decoding = Decoding(Gathered(), speculation=parrot(wanted, wrong))
    assert answer(model("llama"), prompts[0], decoding, **options) == [wanted]
    assert seen == alone
    assert decoding.counts.proposed > 0


@pytest.mark.parametrize("place", range(1, 20, 2))
def test_an_end_among_accepted_tokens_ends_the_answer(
    place: int, model: Callable[[str], Any], prompts: list[Any]
) -> None:
    loaded, ids = model("llama"), prompts[0]
    (free,) = answer(loaded, ids, eos_token_id=None)
    end = free[ids.shape[1] + place]
    (wanted,) = answer(loaded, ids, eos_token_id=end)
    cache = new_cache(loaded)
    decoding = Decoding(Gathered(), speculation=parrot(free))
    assert answer(loaded, ids, decoding, eos_token_id=end, **given(cache)) == [wanted]
    assert len(decoding.streamer.steps) == len(wanted) - ids.shape[1]
    assert lengths(cache) == {len(wanted) - 1}


@pytest.mark.parametrize("longest", [1, 2, 3, 4, 5, 9, 17, 18, 19])
def test_never_more_tokens_than_asked_for(
    longest: int, model: Callable[[str], Any], prompts: list[Any]
) -> None:
    (free,) = answer(model("gpt2"), prompts[0], max_new_tokens=40)
    decoding = Decoding(Gathered(), speculation=parrot(free))
    tokens = answer(model("gpt2"), prompts[0], decoding, max_new_tokens=longest)
    assert tokens == [free[: prompts[0].shape[1] + longest]]
    assert decoding.counts.accepted == decoding.counts.proposed, "what could not be taken was proposed"


def test_up_to_the_last_position_of_the_model(model: Callable[[str], Any], prompts: list[Any]) -> None:
    """GPT-2 has no position beyond its context: feeding a proposal there would fail."""
    room = tiny.CONTEXT - prompts[1].shape[1]
    wanted = answer(model("gpt2"), prompts[1], max_new_tokens=room, eos_token_id=None)
    decoding = Decoding(Gathered(), speculation=lookup())
    assert answer(model("gpt2"), prompts[1], decoding, max_new_tokens=room, eos_token_id=None) == wanted


# ------------------------------------------------------------------------- the same distribution


def excess(counts: Counter[Any], expected: dict[Any, float]) -> float:
    """Pearson's chi-square by its degrees of freedom, over cells that expect at least five."""
    draws = sum(counts.values())
    cells = {cell: share * draws for cell, share in expected.items() if share * draws >= 5}
    impossible = [cell for cell in counts if expected.get(cell, 0.0) == 0.0]
    assert not impossible
    return sum((counts[cell] - mean) ** 2 / mean for cell, mean in cells.items()) / (len(cells) - 1)


@pytest.mark.parametrize("kind", ["near", "far", "the same", "apart in places"])
def test_who_draws_ahead_by_the_same_numbers_is_mostly_right(kind: str) -> None:
    """At least as often as the bound for this coupling says."""
    import torch

    torch.manual_seed(3)
    scores = torch.randn(1, 8)
    other = {
        "near": scores + 0.3 * torch.randn(1, 8),
        "far": torch.randn(1, 8) * 3,
        "the same": scores,
        "apart in places": torch.where(torch.arange(8) % 2 == 0, torch.zeros(8), -torch.inf)[None],
    }[kind]
    p, q = torch.softmax(scores, -1), torch.softmax(other, -1)
    right, tokens = 0, Counter[int]()
    with seeded(5, "cpu"):
        for _ in range(4000):
            proposed = int(torch.multinomial(q, 1, generator=drawn_ahead("cpu")))
            token = int(choose(scores, True))
            right += token == proposed
            tokens[token] += 1
    assert excess(tokens, dict(enumerate(p[0].tolist()))) < 2.5
    distance = float((p - q).abs().sum()) / 2
    assert right / 4000 >= (1 - distance) / (1 + distance) - 0.03
    assert right == 4000 or kind != "the same"


def test_without_a_seed_torchs_own_generator_is_drawn_ahead() -> None:
    import torch

    before = torch.get_rng_state()
    ahead = torch.rand(3, generator=drawn_ahead("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.rand(3), ahead)


@pytest.mark.parametrize("lengths", [(1, 1), (3, 1), (2, 5)])
def test_a_seed_repeats_an_answer_whatever_is_proposed(
    lengths: tuple[int, int], model: Callable[[str], Any], prompts: list[Any]
) -> None:
    """How much is proposed depends on the clock."""

    class Taken:
        def __init__(self) -> None:
            self.turn = 0

        def longest(self, room: int) -> int:
            self.turn += 1
            return min(room, lengths[self.turn % 2])

    options = {"do_sample": True, "temperature": 1.5, "seed": 7}
    expected = answer(model("llama"), prompts[0], **options)
    pace, taken = eager_pace(), Taken()
    pace.longest = taken.longest  # type: ignore[method-assign]
    pace.length = lambda _grade, room: room  # type: ignore[method-assign]
    draft = DraftModel(model("gpt2"), tiny.VOCABULARY)
    decoding = Decoding(Gathered(), speculation=Speculation(draft, pace))
    assert answer(model("llama"), prompts[0], decoding, **options) == expected
    assert decoding.counts.proposed > decoding.counts.accepted > 0


def test_sampled_pairs_with_a_draft_are_distributed_as_without(tmp_path: Path) -> None:
    """Two tokens after a prompt, by a model of few tokens, against its exact probabilities."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def tiny_llama(seed: int) -> Any:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=5,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.5,
            bos_token_id=None,
            eos_token_id=None,
        )
        return LlamaForCausalLM(config).eval()

    target, draft = tiny_llama(1), DraftModel(tiny_llama(2), 5)
    ids, options = torch.tensor([[1, 2, 3]]), {"do_sample": True, "temperature": 0.8, "top_k": 4}
    expected = exact_triples(target, ids, temperature=0.8, top_k=4)
    counts: Counter[tuple[int, ...]] = Counter()
    total = Decoding(Gathered()).counts
    for seed in range(1500):
        decoding = Decoding(Gathered(), speculation=Speculation(draft, eager_pace()), counts=total)
        (tokens,) = answer(target, ids, decoding, seed=seed, max_new_tokens=3, **options)
        counts[tuple(tokens[3:])] += 1
    assert 0 < total.accepted < total.proposed
    assert excess(counts, expected) < 1.6


def exact_triples(model: Any, ids: Any, temperature: float, top_k: int) -> dict[tuple[int, ...], float]:
    import torch

    def shares(tokens: tuple[int, ...]) -> Any:
        text = torch.cat([ids, torch.tensor([list(tokens)], dtype=torch.long)], dim=1)
        with torch.no_grad():
            scores = model(text).logits[0, -1].float() / temperature
        least = scores.topk(top_k).values[-1]
        return torch.softmax(scores.masked_fill(scores < least, -torch.inf), -1).tolist()

    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        found = {
            (*tokens, token): chance * share
            for tokens, chance in found.items()
            for token, share in enumerate(shares(tokens))
        }
    return found


# --------------------------------------------------------------------------------------- proposers


def longest_match(ids: Sequence[int]) -> int:
    """The slow way: the most tokens at the end that were there before, elsewhere."""
    lengths = [
        next((k for k in range(place) if ids[place - 1 - k] != ids[-1 - k]), place)
        for place in range(1, len(ids))
    ]
    return max(lengths, default=0)


def test_lookup_finds_what_followed_the_same_words() -> None:
    proposer = PromptLookup()
    ids = [5, 6, 7, 8, 9, 1, 2, 5, 6, 3, 6, 7]
    proposer.begin(ids, None, None)
    assert proposer.propose(ids, 3) == Proposal([8, 9, 1], grade=1)
    assert proposer.propose([*ids, 8], 2) == Proposal([9, 1], grade=2)
    assert proposer.propose([*ids, 8, 4], 2) == Proposal()
    assert proposer.propose([*ids, 8, 4, 5], 9).tokens == [6, 3, 6, 7, 8, 4, 5, 6, 3]


def test_lookup_goes_on_with_what_repeats_itself() -> None:
    proposer = PromptLookup()
    ids = [9, 1, 2, 3, 1, 2, 3, 1, 2]
    proposer.begin(ids[:4], None, None)
    assert proposer.propose(ids, 7).tokens == [3, 1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("seed", range(8))
def test_lookup_finds_a_match_whenever_there_is_one(seed: int) -> None:
    """Its grade is that of the longest match, unless that is a longer one with the same last four tokens."""
    draw = random.Random(seed)
    ids = [draw.randrange(6) for _ in range(20)]
    proposer = PromptLookup()
    proposer.begin(list(ids), None, None)
    for _ in range(300):
        start = draw.randrange(len(ids) - 6)
        ids += ids[start : start + 5] if draw.random() < 0.2 else [draw.randrange(6)]
        length = longest_match(ids)
        proposal = proposer.propose(ids, 4)
        if length < 5:
            assert proposal.grade == {0: 0, 1: 0, 2: 1, 3: 2, 4: 2}[length]
            assert len(proposal.tokens) == (4 if length else 0)
        else:
            assert proposal.grade >= 2


def test_lookup_stays_with_the_passage_it_copies() -> None:
    """A run that is there twice goes on as the passage before it did, not as the latest one."""
    passage = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    ids = [*passage, 20, 5, 6, 7, 8, 30, 31, 1, 2, 3]
    proposer = PromptLookup()
    proposer.begin(ids, None, None)
    for token in passage[3:]:
        assert proposer.propose(ids, 1).tokens == [token]
        ids.append(token)


def draft_of(model: Any) -> Speculation:
    return Speculation(DraftModel(model, tiny.VOCABULARY), eager_pace())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_a_draft_that_is_the_model_is_always_right(
    name: str, model: Callable[[str], Any], prompts: list[Any]
) -> None:
    speculation = draft_of(model(name))
    for ids in (*prompts, prompts[0]):
        wanted = answer(model(name), ids, max_new_tokens=35, eos_token_id=None)
        decoding = Decoding(Gathered(), speculation=speculation)
        assert answer(model(name), ids, decoding, max_new_tokens=35, eos_token_id=None) == wanted
        assert decoding.counts.accepted == decoding.counts.proposed == 32
        assert decoding.counts.sweeps == 2  # of 34 tokens after the first


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "gemma"])
@pytest.mark.parametrize("choice", [{}, {"repetition_penalty": 1.3}])
def test_another_model_as_draft_changes_nothing(
    name: str,
    choice: dict[str, Any],
    model: Callable[[str], Any],
    prompts: list[Any],
    stock: Callable[..., list[int]],
) -> None:
    speculation = draft_of(model(name))
    for text, ids in enumerate(prompts):
        decoding = Decoding(Gathered(), speculation=speculation)
        assert answer(model("llama"), ids, decoding, **choice) == [stock("llama", text, **choice)]
        assert decoding.counts.proposed > decoding.counts.accepted


def test_a_draft_reads_only_what_is_new(model: Callable[[str], Any], prompts: list[Any]) -> None:
    draft, fed = DraftModel(model("gpt2"), tiny.VOCABULARY), []
    ids = prompts[0][0].tolist()
    handle = model("gpt2").transformer.register_forward_pre_hook(
        lambda _module, inputs, kwargs: fed.append((inputs[0] if inputs else kwargs["input_ids"]).shape[1]),
        with_kwargs=True,
    )
    try:
        draft.begin(ids, None, "cpu")
        first = draft.propose(ids, 4)
        assert fed == [len(ids) - 1, 1, 1, 1, 1]
        draft.propose([*ids, *first.tokens[:2], 300], 2)  # two were right, the third another
        assert fed[5:] == [1, 1]
        assert draft.propose(ids, 4) == first
        assert sum(tensor.shape[2] for tensor in draft.tensors()) == 2 * tiny.LAYERS * (len(ids) + 3)
    finally:
        handle.remove()


@pytest.mark.parametrize("vocabulary", [tiny.VOCABULARY - 30, tiny.VOCABULARY + 30])
def test_a_draft_with_other_padding_of_its_logits(
    vocabulary: int, model: Callable[[str], Any], prompts: list[Any]
) -> None:
    draft = DraftModel(model("gpt2"), vocabulary)
    ids = prompts[0][0].tolist()
    draft.begin(ids, [], "cpu")
    proposal = draft.propose(ids, 16)
    assert len(proposal.tokens) == 16
    assert max(proposal.tokens) < min(vocabulary, tiny.VOCABULARY)


@pytest.mark.parametrize("call", [1, 2, 4, 9])
def test_a_draft_that_fails_is_done_without_for_a_sweep(
    call: int, model: Callable[[str], Any], prompts: list[Any]
) -> None:
    wanted = answer(model("llama"), prompts[0])
    speculation = draft_of(model("gpt2"))
    decoding = Decoding(Gathered(), speculation=speculation, recover=lambda error: isinstance(error, NoRoom))
    with fails_at(decoder_layers(model("gpt2"))[2], call):
        assert answer(model("llama"), prompts[0], decoding) == wanted
    assert decoding.counts.repeats == 1
    decoding = Decoding(Gathered(), speculation=speculation)
    with pytest.raises(NoRoom), fails_at(decoder_layers(model("gpt2"))[1], call):
        answer(model("llama"), prompts[0], decoding)
    assert answer(model("llama"), prompts[0], Decoding(Gathered(), speculation=speculation)) == wanted


def test_other_vocabularies_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny.save_tokenizer(tmp_path / "a")
    same = tiny.save_tokenizer(tmp_path / "b", chat_template=False)
    other = tiny.save_tokenizer(tmp_path / "c", byte_level=False)
    require_same_vocabulary(tokenizer, same, "small")
    with pytest.raises(OptionError, match="small has other tokens") as refusal:
        require_same_vocabulary(tokenizer, other, "small")
    assert "--draft" in refusal.value.next_step


# -------------------------------------------------------------------------------------------- pace


def run(pace: Pace, seconds: Callable[[int], float], right: Callable[[int], int], sweeps: int) -> list[int]:
    """Lengths that a pace chose, in a world where sweeps take ``seconds`` and ``right`` tokens are right."""
    chosen = []
    for _ in range(sweeps):
        length = pace.length(0, 99)
        chosen.append(length)
        pace.add(1 + length, seconds(1 + length))
        pace.judge(0, length, min(length, right(length)))
    return chosen


def flat(_tokens: int) -> float:
    return 0.5


def steep(tokens: int) -> float:
    return 0.5 * tokens


def new_pace(prior: float = 0.7, most: int = 16) -> Pace:
    pace = Pace(most)
    pace.begin((prior,))
    return pace


def test_flat_sweeps_and_right_tokens_go_long() -> None:
    chosen = run(new_pace(), flat, lambda _: 99, 200)
    assert chosen[:4] == [0, 4, 8, 16]
    assert chosen.count(16) > 190
    assert 0 in chosen[4:], "one token alone is measured anew now and then"


def test_never_more_than_the_most() -> None:
    assert max(run(new_pace(most=5), flat, lambda _: 99, 50)) == 4


def test_sweeps_that_grow_with_their_tokens_are_left_alone_but_tried_again() -> None:
    chosen = run(new_pace(), steep, lambda _: 99, 400)
    tries = [turn for turn, length in enumerate(chosen) if length]
    assert 1 < len(tries) <= 400 // 20
    assert max(chosen) == 4
    assert chosen[-1] == 0 or tries[-1] == 399


def test_wrong_tokens_turn_it_off_where_they_cost() -> None:
    chosen = run(new_pace(), lambda tokens: 0.5 + 0.05 * (tokens - 1), lambda _: 0, 300)
    lost = sum(0.05 * length for length in chosen[20:])
    assert 0 < lost < 0.02 * 0.5 * len(chosen)


def test_it_comes_back_when_tokens_are_right_again() -> None:
    pace = new_pace()
    costly: Callable[[int], float] = lambda tokens: 0.5 + 0.05 * (tokens - 1)  # noqa: E731
    run(pace, costly, lambda _: 0, 200)
    assert run(pace, costly, lambda _: 99, 200)[-20:].count(0) <= 1


def test_the_length_follows_the_share_of_right_tokens() -> None:
    costly: Callable[[int], float] = lambda tokens: 0.5 + 0.02 * (tokens - 1)  # noqa: E731
    means = [
        sum(run(new_pace(), costly, lambda _, k=right: k, 100)[20:]) / 80  # type: ignore[misc]
        for right in (1, 3, 99)
    ]
    assert means[0] < means[1] < means[2]


def test_tokens_behind_a_wrong_one_are_no_evidence() -> None:
    """Twelve right ones and a wrong one are a share of 0.9: 6.1 tokens in 0.9 s. Of sixteen, it were 4."""
    pace = new_pace(prior=0.5)
    for tokens in (1, *(1 + length for length in LENGTHS)):
        pace.add(tokens, 0.5 + 0.05 * (tokens - 1))
    for _ in range(10):
        pace.judge(0, 16, 12)
    assert pace.length(0, 99) == 8


def test_a_hiccup_is_not_for_ever() -> None:
    pace = new_pace()
    run(pace, flat, lambda _: 99, 10)
    pace.add(17, 60.0)
    assert 16 in run(pace, flat, lambda _: 99, 150)


def test_the_first_sweep_of_its_size_may_be_slow() -> None:
    """It records what later ones run."""
    pace = new_pace()
    seen: set[int] = set()

    def seconds(tokens: int) -> float:
        first = tokens not in seen
        seen.add(tokens)
        return 0.9 if first else 0.5

    assert run(pace, seconds, lambda _: 99, 150).count(16) > 80


def test_moved_blocks_are_measured_anew() -> None:
    pace = new_pace()
    run(pace, flat, lambda _: 99, 50)
    pace.forget()
    assert pace.length(0, 99) == 0
    run(pace, steep, lambda _: 99, 10)
    assert pace.length(0, 99) == 0


def test_room_and_grades_limit_a_proposal() -> None:
    pace = Pace()
    pace.begin((0.0, 0.95))
    for tokens in (1, *(1 + length for length in LENGTHS)):
        pace.add(tokens, 0.5 + 0.001 * tokens)
    assert [pace.length(1, room) for room in (0, 1, 3, 7, 15, 16, 99)] == [0, 1, 2, 4, 8, 16, 16]
    assert pace.length(0, 99) == 0
    assert pace.longest(99) == 16


def test_nothing_is_proposed_for_the_first_sweep_and_its_time_is_the_clocks(
    model: Callable[[str], Any], prompts: list[Any]
) -> None:
    """Every reading of the clock is a second later, so all sweeps take one: flat, so it goes long."""
    ticks = iter(range(10_000))
    (wanted,) = answer(model("llama"), prompts[0], max_new_tokens=60, eos_token_id=None)
    pace = Pace(clock=lambda: float(next(ticks)))
    speculation = Speculation(parrot(wanted).proposer, pace)
    decoding = Decoding(Gathered(), speculation=speculation)
    tokens = answer(model("llama"), prompts[0], decoding, max_new_tokens=60, eos_token_id=None)
    assert tokens == [wanted]
    # Alone, then 4, 8, 16 and 16 proposed, and what is left: 59 = 1 + 5 + 9 + 17 + 17 + 9 + 1.
    assert decoding.counts.sweeps == 7
    assert next(ticks) == 2 * decoding.counts.sweeps
