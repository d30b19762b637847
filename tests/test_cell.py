from __future__ import annotations

import pytest

from llm_magic.cell import parse_cell_line
from llm_magic.errors import OptionError


def test_every_option_reaches_its_place() -> None:
    parsed = parse_cell_line(
        'answer << -f json -m qwen -s "Be brief." -t 0.5 --top-p .9 --top-k 40 --min-p 0.05 --seed 7 -n 20 '
        r'--stop "\n\n" --stop END --chat c --no-template --no-stream --raw --dry-run --param repetition_penalty 1.1'
    )
    assert (parsed.out, parsed.raw, parsed.ask.stream, parsed.dry_run) == ("answer", True, False, True)
    ask = parsed.ask
    assert (ask.output_format, ask.model, ask.system, ask.chat) == ("json", "qwen", "Be brief.", "c")
    assert not ask.use_template
    assert ask.sampling == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "seed": 7,
        "max_new_tokens": 20,
        "stop": ("\n\n", "END"),
        "extra": {"repetition_penalty": 1.1},
    }


@pytest.mark.parametrize("line", ["x <<", "-o x", "--out x", "x << -t 0"])
def test_a_variable_is_bound_either_way(line: str) -> None:
    assert parse_cell_line(line).out == "x"


@pytest.mark.parametrize(
    ("line", "says", "next_step"),
    [
        ("--temprature 1", "no option --temprature", "Did you mean --temperature?"),
        ("-t nan", "not a number", ""),
        ("-t -1", "not a number from 0 to 10", ""),
        ("-t", "expected one argument", "--help"),
        ("-n 0", "whole number of at least 1", ""),
        ("-n 1.5", "whole number", ""),
        ("--top-p 2", "from 0 to 1", ""),
        ("gpt2", "does not take 'gpt2'", "--help"),
        ("2x <<", "cannot name a variable", ""),
        ("class <<", "cannot name a variable", ""),
        ("a << -o b", "bound twice", ""),
        ('-s "open', "quote is not closed", ""),
        ("--param temperature 1", "has an option of its own", "--temperature"),
        ("--param top_k", "expected 2 arguments", ""),
    ],
)
def test_a_mistake_is_named_with_the_next_step(line: str, says: str, next_step: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_cell_line(line)
    assert says in caught.value.message
    assert next_step in caught.value.next_step


def test_values_are_expanded_word_by_word() -> None:
    parsed = parse_cell_line("-s {tone} -n 5", expand=lambda word: "very brief" if word == "{tone}" else word)
    assert parsed.ask.system == "very brief"


def test_help_wins_over_mistakes() -> None:
    assert parse_cell_line("--help --nonsense").help
