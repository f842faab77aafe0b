"""Short Chinese and English sentences to train a tiny language model on: capitals, provinces, sums and proverbs.

Every fact is told in several forms. `sentences` holds out some forms, at most one of each fact, so that what is held
out can be told from what stays: a model that has learnt the facts, not the lines, gives it a low loss.

    python examples/sentences.py        # counts, and some of each kind
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import NamedTuple

DATA = Path(__file__).parent / "data"
HELD_OUT = 0.06
LARGEST_NUMBER = 20

TAKES_ARTICLE = {"United Kingdom", "United States", "Philippines"}
AUTONOMOUS_REGIONS = {"Inner Mongolia", "Guangxi", "Tibet", "Ningxia", "Xinjiang"}

# A tuple of forms tells one fact.
CAPITAL_FORMS = (
    (
        "{zh}的首都是{capital_zh}。",
        "{capital_zh}是{zh}的首都。",
        "{zh}的首都叫{capital_zh}。",
        "{zh}的首都是哪里？{capital_zh}。",
        "哪个城市是{zh}的首都？{capital_zh}。",
        "{capital_zh}是哪个国家的首都？{zh}。",
    ),
    (
        "The capital of {the_en} is {capital_en}.",
        "{capital_en} is the capital of {the_en}.",
        "The capital city of {the_en} is called {capital_en}.",
        "What is the capital of {the_en}? {capital_en}.",
        "Which city is the capital of {the_en}? {capital_en}.",
        "Which country has {capital_en} as its capital? {The_en}.",
    ),
)
PROVINCE_FORMS = (
    (
        "{zh}的{seat}是{capital_zh}。",
        "{capital_zh}是{zh}的{seat}。",
        "{zh}的{seat}叫{capital_zh}。",
        "{zh}的{seat}是哪里？{capital_zh}。",
        "{capital_zh}是哪个{division}的{seat}？{zh}。",
    ),
    (
        "The capital of {full_en} is {capital_en}.",
        "{capital_en} is the capital of {full_en}.",
        "What is the capital of {full_en}? {capital_en}.",
        "Which city is the capital of {full_en}? {capital_en}.",
        "Which {division_en} has {capital_en} as its capital? {en}.",
    ),
)
NAME_FORMS = (
    (
        "{zh}的英文是 {en}。",
        "{en} 的中文是{zh}。",
        "{zh}用英语怎么说？{en}。",
        "The Chinese name of {the_en} is {zh}.",
    ),
    (
        "{capital_zh}的英文是 {capital_en}。",
        "{capital_en} 的中文是{capital_zh}。",
        "{capital_zh}用英语怎么说？{capital_en}。",
        "The Chinese name of {capital_en} is {capital_zh}.",
    ),
)
PROVERB_FORMS = (
    (
        "{zh}",
        "{en}",
        "中文：{zh} 英文：{en}",
        "英文：{en} 中文：{zh}",
        "俗话说：“{zh}”",
        "As the saying goes: {en}",
    ),
)
SUM_FORMS = {
    "+": ("{a} + {b} = {c}", "{a_zh}加{b_zh}等于{c_zh}。", "{a_en} plus {b_en} is {c_en}."),
    "-": ("{a} - {b} = {c}", "{a_zh}减{b_zh}等于{c_zh}。", "{a_en} minus {b_en} is {c_en}."),
}

ZH_DIGITS = "零一二三四五六七八九"
EN_UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
EN_TEENS = [
    "ten",
    "eleven",
    "twelve",
    *(f"{stem}teen" for stem in ("thir", "four", "fif", "six", "seven", "eigh", "nine")),
]
EN_TENS = {2: "twenty", 3: "thirty", 4: "forty"}


class Fact(NamedTuple):
    """One fact of a kind, with every sentence that tells it."""

    kind: str
    forms: tuple[str, ...]


def read_rows(name: str) -> list[dict[str, str]]:
    """The rows of `data/<name>.jsonl`."""
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def chinese_number(number: int) -> str:
    """0 to 49 in Chinese characters."""
    tens, ones = divmod(number, 10)
    if not tens:
        return ZH_DIGITS[ones]
    return (ZH_DIGITS[tens] if tens > 1 else "") + "十" + (ZH_DIGITS[ones] if ones else "")


def english_number(number: int) -> str:
    """0 to 49 in English words."""
    if number < 20:
        return [*EN_UNITS, *EN_TEENS][number]
    tens, ones = divmod(number, 10)
    return EN_TENS[tens] + (f"-{EN_UNITS[ones]}" if ones else "")


def facts() -> list[Fact]:
    """Every fact there is, always in the same order."""
    return _capitals() + _provinces() + _proverbs() + _sums()


def sentences(seed: int = 0) -> tuple[list[str], list[str]]:
    """Training and held-out sentences, shuffled; the same for the same seed.

    Of every kind the same share is held out, one form of a fact at most: all its other forms stay in training.
    """
    rng = random.Random(seed)
    by_kind: dict[str, list[Fact]] = {}
    for fact in facts():
        by_kind.setdefault(fact.kind, []).append(fact)
    training: list[str] = []
    held_out: list[str] = []
    for members in by_kind.values():
        forms = [form for fact in members for form in fact.forms]
        chosen = [rng.choice(fact.forms) for fact in rng.sample(members, round(HELD_OUT * len(forms)))]
        taken = set(chosen)
        held_out += chosen
        training += [form for form in forms if form not in taken]
    rng.shuffle(training)
    rng.shuffle(held_out)
    return training, held_out


def _tell(kind: str, groups: tuple[tuple[str, ...], ...], words: dict[str, str]) -> list[Fact]:
    return [Fact(kind, tuple(form.format(**words) for form in group)) for group in groups]


def _capitals() -> list[Fact]:
    told: list[Fact] = []
    for row in read_rows("capitals"):
        article = row["en"] in TAKES_ARTICLE
        the, start = ("the ", "The ") if article else ("", "")
        words = row | {"the_en": the + row["en"], "The_en": start + row["en"]}
        told += _tell("capitals", CAPITAL_FORMS, words) + _tell("country and city names", NAME_FORMS, words)
    return told


def _provinces() -> list[Fact]:
    told: list[Fact] = []
    for row in read_rows("provinces"):
        region = row["en"] in AUTONOMOUS_REGIONS
        words = row | {
            "the_en": row["en"],
            "full_en": row["en"] if region else f"{row['en']} province",
            "seat": "首府" if region else "省会",
            "division": "自治区" if region else "省",
            "division_en": "autonomous region" if region else "province",
        }
        told += _tell("provinces", PROVINCE_FORMS, words) + _tell("province and city names", NAME_FORMS, words)
    return told


def _proverbs() -> list[Fact]:
    return [fact for row in read_rows("proverbs") for fact in _tell("proverbs", PROVERB_FORMS, row)]


def _sums() -> list[Fact]:
    numbers = range(LARGEST_NUMBER + 1)
    added = [_sum(a, "+", b, a + b) for a in numbers for b in numbers]
    return added + [_sum(a, "-", b, a - b) for a in numbers for b in numbers if b <= a]


def _sum(a: int, sign: str, b: int, c: int) -> Fact:
    words: dict[str, str] = {}
    for name, number in (("a", a), ("b", b), ("c", c)):
        words |= {name: str(number), f"{name}_zh": chinese_number(number), f"{name}_en": english_number(number)}
    words["a_en"] = words["a_en"].capitalize()
    return Fact("additions" if sign == "+" else "subtractions", tuple(f.format(**words) for f in SUM_FORMS[sign]))


def main() -> None:
    training, held_out = sentences()
    counts: Counter[str] = Counter()
    for fact in facts():
        counts[fact.kind] += len(fact.forms)
    for kind, count in counts.items():
        print(f"{count:5} {kind}")
    print(f"{len(training):5} for training, {len(held_out)} held out, {len(set(''.join(training)))} characters")
    print(*training[:12], sep="\n")


if __name__ == "__main__":
    main()
