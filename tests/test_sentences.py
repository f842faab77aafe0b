"""examples/sentences.py and the data beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import sentences as examples

DATA = Path(__file__).parents[1] / "examples" / "data"
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty"
)
ENGLISH = dict(zip(NUMBERS.split(), [*range(21), 30, 40], strict=True))


def rows(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def split():
    return examples.sentences()


def test_no_sentence_is_in_both_or_twice(split):
    training, held_out = split
    together = training + held_out
    assert len(set(together)) == len(together)
    assert set(together) == {form for fact in examples.facts() for form in fact.forms}
    assert 0.05 < len(held_out) / len(together) < 0.07


def test_a_seed_says_which_are_held_out(split):
    assert examples.sentences() == split
    assert set(examples.sentences(seed=1)[1]) != set(split[1])


@pytest.mark.parametrize("seed", range(3))
def test_what_is_held_out_is_in_training_in_other_words(seed):
    training, held_out = map(set, examples.sentences(seed))
    found = 0
    for fact in examples.facts():
        missing = held_out.intersection(fact.forms)
        found += len(missing)
        if missing:
            assert len(training.intersection(fact.forms)) >= 2, fact
    assert found == len(held_out)


def test_every_kind_and_every_character_is_in_training(split):
    training, held_out = split
    assert set("".join(held_out)) <= set("".join(training))
    for kind in {fact.kind for fact in examples.facts()}:
        assert set(held_out) & {form for fact in examples.facts() if fact.kind == kind for form in fact.forms}


def test_sentences_are_short_and_sums_no_more_than_two_fifths():
    told = examples.facts()
    every = [form for fact in told for form in fact.forms]
    sums = [form for fact in told if fact.kind in ("additions", "subtractions") for form in fact.forms]
    assert max(map(len, every)) <= 100
    assert not [form for form in every if "{" in form or form != form.strip()]
    assert len(sums) <= 0.4 * len(every)


def from_chinese(words):
    """The number that Chinese numerals below a hundred say."""
    tens, ten, ones = words.rpartition("十")
    digit = "零一二三四五六七八九".index
    return ((digit(tens) if tens else 1) * 10 if ten else 0) + (digit(ones) if ones else 0)


def from_english(words):
    return sum(ENGLISH[part] for part in words.lower().split("-"))


def test_sums_are_right_in_every_form():
    for fact in examples.facts():
        if fact.kind not in ("additions", "subtractions"):
            continue
        digits, chinese, english = fact.forms
        a, sign, b, c = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", digits).groups()
        numbers = (int(a), int(b), int(c))
        assert numbers[2] == (numbers[0] + numbers[1] if sign == "+" else numbers[0] - numbers[1])
        said = re.fullmatch(r"(\w+)[加减](\w+)等于(\w+)。", chinese).groups()
        assert tuple(map(from_chinese, said)) == numbers, chinese
        said = re.fullmatch(r"([\w-]+) (?:plus|minus) ([\w-]+) is ([\w-]+)\.", english).groups()
        assert tuple(map(from_english, said)) == numbers, english
        assert ("加" in chinese, "plus" in english) == (sign == "+",) * 2


@pytest.mark.parametrize(("name", "count"), [("capitals.jsonl", 98), ("provinces.jsonl", 27), ("proverbs.jsonl", 100)])
def test_facts_have_their_fields_and_none_is_ambiguous(name, count):
    facts = rows(name)
    fields = ["zh", "en"] if name == "proverbs.jsonl" else ["zh", "capital_zh", "en", "capital_en"]
    assert len(facts) == count
    assert all(list(row) == fields for row in facts)
    for field in fields:
        assert len({row[field] for row in facts}) == count, field
        assert all(
            re.search("[\u4e00-\u9fff]", row[field]) if "zh" in field else row[field].isascii() for row in facts
        )


def test_proverbs_are_short():
    assert all(len(row["zh"]) <= 16 and len(row["en"].split()) <= 12 for row in rows("proverbs.jsonl"))


def test_instructions_have_their_fields():
    lines = (DATA / "instructions.jsonl").read_text(encoding="utf-8").splitlines()
    instructions = rows("instructions.jsonl")
    assert len(instructions) == len({(row["instruction"], row["input"]) for row in instructions}) == 160
    assert max(map(len, lines)) < 120
    for row in instructions:
        assert list(row) == ["instruction", "input", "output"]
        assert row["instruction"]
        assert row["output"]
    assert sum(bool(row["input"]) for row in instructions) > 40


def test_conversations_have_their_fields_and_take_turns():
    conversations = rows("conversations.jsonl")
    assert len(conversations) == 80
    turns = []
    for row in conversations:
        assert list(row) == ["messages"]
        assert all(list(message) == ["role", "content"] and message["content"] for message in row["messages"])
        roles = [message["role"] for message in row["messages"] if message["role"] != "system"]
        assert "system" not in [message["role"] for message in row["messages"][1:]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        turns.append(len(roles) // 2)
    assert set(turns) == {1, 2, 3}
    assert sum(number > 1 for number in turns) == 25
