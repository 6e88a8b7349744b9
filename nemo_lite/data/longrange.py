"""Synthetic long-range tasks: what a text says early is asked at its end (after RULER, arXiv 2404.06654).

A task is a generator of (context, question, answer). `evaluate/ruler.py` asks a model the question; `documents` and
``nemo-lite data longrange`` join the three into training text. Both come from `make`, from different seeds: what is
drawn is a function of purpose, seed, task, length and index alone, so that no evaluation prompt is ever trained on, and
the same arguments give the same bytes on every machine.

| task         | context                                          | asked                              |
|--------------|--------------------------------------------------|------------------------------------|
| `single`     | filler with one sentence "The number for K is V" | V                                  |
| `multikey`   | five such sentences with different keys          | the V of one key                   |
| `multivalue` | two keys with three values each                  | the values of one key, in order    |
| `multiquery` | four keys                                        | the values of three of them        |
| `variables`  | two chains "X = 12345", "Y = X", "Z = Y"         | the variables that hold one number |
| `words`      | a list in which three words are common           | the three, the commonest first     |
| `facts`      | short notes about people, all of one form        | one fact about one of them         |

Every question comes with distractors: answers of the same form that are wrong, and that a model which cannot find
the place in the context has no reason to like less.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nemo_lite.config import UserError

Purpose = Literal["train", "evaluate"]
DISTRACTORS = 4


def _each(words: str) -> list[str]:
    return words.split()


_ADJECTIVES = _each(
    """
    amber ancient azure bitter blunt brave bright broad calm chilly clever coarse crimson curly damp dark distant
    dusty eager early faint fancy fierce gentle giant golden grand green hollow honest humble icy idle jolly keen
    large lazy lively lonely loud lucky mellow mighty misty modest narrow noble odd pale plain proud quick quiet
    rapid rare rough round rusty salty sandy sharp shiny silent silver simple sleepy slow small smooth soft solid
    spare steady steep stern stout strange sunny sweet swift tall tame tender tiny vast warm weary white wide wild
    wise young
    """
)
_NOUNS = _each(
    """
    acorn anchor apple arrow badger barrel basket beacon bell bird boat bottle branch bridge brook broom bucket
    button cabin candle canyon carpet castle cedar cherry circle cliff cloud clover comet copper coral cottage
    cradle crane cricket crown curtain daisy desert dolphin donkey dragon eagle ember engine falcon feather fence
    fern ferry fiddle flame flute forest fox galley garden gate glacier goose grape hammer harbor hazel hedge heron
    hill honey horn island ivory jacket jungle kettle kite ladder lagoon lantern laurel lemon lily lion lizard
    locket magnet maple marble marsh meadow mirror mitten moon mountain needle nettle oak ocean olive orchard otter
    owl paddle palace pebble pepper pigeon pillow pine planet plum pocket pond prairie puzzle quartz quill rabbit
    raven reed ribbon river robin rocket saddle sail salmon shadow shell shore sparrow spider spruce squirrel star
    stone stove swallow table temple thimble thistle tiger torch tower trumpet tulip tunnel turtle valley velvet
    village violet wagon walnut whale willow window wolf
    """
)
_VERBS = _each(
    """
    carries crosses faces follows guards hides holds leaves meets passes reaches shades touches turns watches
    welcomes
    """
)
_NAMES = _each(
    """
    Ada Agnes Albert Alma Anton Arthur Astrid Bela Bruno Carla Cecil Clara Daria David Dora Edgar Edith Elias Elsa
    Emil Erik Ester Felix Flora Frank Frida Georg Greta Gustav Hanna Hector Helga Henry Hilda Hugo Ida Igor Irma
    Ivan Jana Jonas Julia Karl Klara Lars Laura Leon Lena Louis Lydia Marco Maria Max Mila Nadia Nils Nora Olga
    Oscar Otto Paula Peter Petra Quentin Ralf Rosa Rudolf Samuel Selma Simon Sonja Stella Theo Tilda Tomas Ursula
    Victor Vera Walter Wanda Xenia Yves Zora
    """
)
_CITIES = _each(
    """
    Athens Basel Bergen Berlin Bilbao Boston Bremen Cairo Dakar Delhi Dublin Florence Geneva Ghent Hanoi Havana
    Helsinki Jakarta Krakow Lagos Leeds Lima Lisbon London Lyon Madrid Malmo Manila Milan Munich Nairobi Naples Oslo
    Oxford Paris Porto Prague Quito Riga Rome Seoul Sofia Sydney Tallinn Tokyo Toronto Tunis Turin Venice Vienna
    Vilnius Warsaw York Zagreb Zurich
    """
)
_WORK = _each(
    """
    baker barber botanist builder butcher carpenter chemist clerk cook dancer dentist doctor driver farmer fisher
    florist gardener glazier guide hunter judge lawyer mason mechanic miller miner nurse painter pilot plumber poet
    porter potter printer sailor sculptor singer smith surgeon tailor teacher trader vet waiter watchmaker weaver
    writer
    """
)


@dataclass(frozen=True)
class Sample:
    """One question about one context. The text is context + question + answer; the answer starts with a space.

    parts        the answer in pieces that are right or wrong on their own; joined they are the answer.
    distractors  wrong answers of the same form.
    """

    task: str
    context: str
    question: str
    parts: tuple[str, ...]
    distractors: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return self.context + self.question

    @property
    def answer(self) -> str:
        return "".join(self.parts)

    @property
    def text(self) -> str:
        return f"{self.prompt}{self.answer}.\n"


@dataclass
class _Plan:
    """What a task wants: `needles` that must be there in this order, at random places among the filler; fill(n) makes n
    units of filler; and what is asked."""

    opening: str
    needles: list[str]
    fill: Callable[[int], list[str]]
    question: str
    parts: tuple[str, ...]
    distractors: tuple[str, ...]
    joint: str = " "
    least: int = 1  # filler units that there must be


# --------------------------------------------------------------------------------------------------------------- tasks


def _listed(values: Sequence[str]) -> tuple[str, ...]:
    """``" a", ", b", ", c"``: a list of values as the parts of an answer."""
    return tuple(f"{' ' if i == 0 else ', '}{value}" for i, value in enumerate(values))


def _wrong(right: Sequence[str], draw: Callable[[], Sequence[str]]) -> tuple[str, ...]:
    """Distinct wrong answers, each a list like the right one; draw() gives lists, right ones among them."""
    seen, found = {tuple(right)}, []
    while len(found) < DISTRACTORS:
        new = tuple(draw())
        if new not in seen:
            seen.add(new)
            found.append("".join(_listed(new)))
    return tuple(found)


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(number) for number in rng.sample(range(10_000, 100_000), count)]


def _keys(rng: random.Random, count: int) -> list[str]:
    """Keys of two words; no two share a word, so that each word alone finds the place."""
    return [f"{a} {n}" for a, n in zip(rng.sample(_ADJECTIVES, count), rng.sample(_NOUNS, count))]


def _sentences(rng: random.Random) -> Callable[[int], list[str]]:
    def fill(count: int) -> list[str]:
        pick = rng.choice
        return [
            f"The {pick(_ADJECTIVES)} {pick(_NOUNS)} {pick(_VERBS)} the {pick(_ADJECTIVES)} {pick(_NOUNS)}."
            for _ in range(count)
        ]

    return fill


_NUMBERS = "Some numbers are hidden in this text. Remember them.\n"


def _needle(key: str, value: str) -> str:
    return f"The number for {key} is {value}."


def _single(rng: random.Random) -> _Plan:
    (key,), values = _keys(rng, 1), _numbers(rng, 1 + DISTRACTORS)
    return _Plan(
        _NUMBERS, [_needle(key, values[0])], _sentences(rng), f"\nThe number for {key} is", _listed(values[:1]),
        tuple(f" {value}" for value in values[1:]),
    )  # fmt: skip


def _multikey(rng: random.Random) -> _Plan:
    count = DISTRACTORS + 1
    keys, values = _keys(rng, count), _numbers(rng, count)
    asked = rng.randrange(count)
    others = tuple(f" {value}" for i, value in enumerate(values) if i != asked)
    return _Plan(
        _NUMBERS, [_needle(k, v) for k, v in zip(keys, values)], _sentences(rng),
        f"\nThe number for {keys[asked]} is", _listed([values[asked]]), others,
    )  # fmt: skip


def _multivalue(rng: random.Random) -> _Plan:
    keys, values = _keys(rng, 2), _numbers(rng, 6)
    owner = [0, 0, 0, 1, 1, 1]
    rng.shuffle(owner)
    asked = rng.randrange(2)
    right = [v for v, o in zip(values, owner) if o == asked]

    def draw() -> list[str]:
        return [values[i] for i in sorted(rng.sample(range(6), 3))]

    return _Plan(
        _NUMBERS, [_needle(keys[o], v) for v, o in zip(values, owner)], _sentences(rng),
        f"\nThe numbers for {keys[asked]}, in order, are", _listed(right), _wrong(right, draw),
    )  # fmt: skip


def _multiquery(rng: random.Random) -> _Plan:
    keys, values = _keys(rng, 4), _numbers(rng, 4)
    asked = rng.sample(range(4), 3)
    right = [values[i] for i in asked]
    names = [keys[i] for i in asked]
    return _Plan(
        _NUMBERS, [_needle(k, v) for k, v in zip(keys, values)], _sentences(rng),
        f"\nThe numbers for {names[0]}, {names[1]} and {names[2]}, in this order, are", _listed(right),
        _wrong(right, lambda: rng.sample(values, 3)),
    )  # fmt: skip


def _variables(rng: random.Random) -> _Plan:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) < 6:
        name = "".join(rng.choices(letters, k=3))
        if name not in names:
            names.append(name)
    chains, values = (names[:3], names[3:]), _numbers(rng, 2)
    lines = []
    for chain, value in zip(chains, values):
        lines.append([f"{name} = {before}." for name, before in zip(chain, [value, *chain[:-1]])])
    needles = []
    left = [list(line) for line in lines]
    while any(left):  # the chains interleave; each keeps its order
        line = rng.choices(left, weights=[len(line) for line in left])[0]
        needles.append(line.pop(0))
    asked = rng.randrange(2)
    right = chains[asked]

    def draw() -> list[str]:
        """Each place of the chain by one of the two chains' own."""
        return [chains[rng.randrange(2)][i] for i in range(3)]

    return _Plan(
        "Some variables are assigned in this text.\n", needles, _sentences(rng),
        f"\nThe variables that hold {values[asked]}, in order, are", _listed(right), _wrong(right, draw),
    )  # fmt: skip


def _words(rng: random.Random) -> _Plan:
    pool = rng.sample(_NOUNS, len(_NOUNS))
    common, rest = pool[:3], pool[3:]

    def fill(count: int) -> list[str]:
        """About two fifths are the common words, 7 : 5 : 3; the others come equally often."""
        often = [n * (count // 38) for n in (7, 5, 3)]
        units = [word for word, n in zip(common, often) for _ in range(n)]
        units += [rest[i % len(rest)] for i in range(count - len(units))]
        rng.shuffle(units)
        return units

    return _Plan(
        "Count how often each word comes.\n", [], fill, "\nThe three commonest words, the commonest first, are",
        _listed(common), _wrong(common, lambda: rng.sample(rest[: 3 * DISTRACTORS], 3)),
        least=38,
    )  # fmt: skip


def _facts(rng: random.Random) -> _Plan:
    wide, count = len(_NAMES), DISTRACTORS + 1
    pairs = rng.sample(range(wide * wide), wide * wide)

    def name(i: int) -> str:
        """Person number i. Surnames are others' first names, so that half a name leads elsewhere too."""
        first, last = divmod(pairs[i % len(pairs)], wide)
        more = "".join(f"{_NAMES[n % wide]}-" for n in range(i // len(pairs)))
        return f"{more}{_NAMES[first]} {_NAMES[last]}"

    def note(i: int, city: str, job: str) -> str:
        return f"{name(i)} was born in {city} and works as a {job}."

    cities, work = rng.sample(_CITIES, count), rng.sample(_WORK, count)
    needles = [note(*each) for each in zip(range(count), cities, work)]
    rng.shuffle(needles)
    answers, question = rng.choice([(cities, "was born in"), (work, "works as a")])

    def fill(many: int) -> list[str]:
        return [note(count + i, rng.choice(_CITIES), rng.choice(_WORK)) for i in range(many)]

    return _Plan(
        "Notes about people.\n", needles, fill, f"\n{name(0)} {question}", _listed(answers[:1]),
        tuple(f" {answer}" for answer in answers[1:]), joint="\n",
    )  # fmt: skip


TASKS: dict[str, Callable[[random.Random], _Plan]] = {
    "single": _single,
    "multikey": _multikey,
    "multivalue": _multivalue,
    "multiquery": _multiquery,
    "variables": _variables,
    "words": _words,
    "facts": _facts,
}


# ------------------------------------------------------------------------------------------------------- their length


def make(
    task: str,
    length: int,
    count_tokens: Callable[[list[str]], Sequence[int]],
    *,
    seed: int = 0,
    index: int = 0,
    purpose: Purpose = "evaluate",
) -> Sample | None:
    """Sample number `index` of a task, of at most `length` tokens with its answer, and close to it; None if it cannot
    be as short as that.

    count_tokens(texts) -> tokens of each: the tokenizer decides how much text is `length` tokens.
    """
    sized = _sized(task, length, count_tokens, seed, index, purpose)
    return sized and sized[0]


def _sized(
    task: str, length: int, count_tokens: Callable[[list[str]], Sequence[int]], seed: int, index: int, purpose: Purpose
) -> tuple[Sample, int] | None:
    """A sample as of :func:`make`, and its tokens."""
    if task not in TASKS:
        raise UserError(f"{task}: no such long-range task; there are {', '.join(TASKS)}")
    # A text as seed goes through SHA-512: every part of it changes everything.
    rng = random.Random(f"nemo_lite longrange {purpose} {seed} {task} {length} {index}")
    plan = TASKS[task](rng)
    fixed = plan.opening + plan.joint.join(plan.needles) + plan.question + "".join(plan.parts) + ".\n"
    fixed_tokens, some = count_tokens([fixed, plan.joint.join(plan.fill(40))])
    a_unit = some / 40  # tokens
    units = int((length - fixed_tokens) / a_unit) + 1
    state = rng.getstate()
    while True:
        rng.setstate(state)
        if units < plan.least:
            return None
        sample = _assemble(task, plan, units, rng)
        over = int(count_tokens([sample.text])[0]) - length
        if over <= 0:
            return sample, length + over
        units -= max(1, int(over / a_unit))


def _assemble(task: str, plan: _Plan, units: int, rng: random.Random) -> Sample:
    filler = plan.fill(units)
    places = sorted(rng.randrange(len(filler) + 1) for _ in plan.needles)
    pieces: list[str] = []
    start = 0
    for place, needle in zip(places, plan.needles):
        pieces += [*filler[start:place], needle]
        start = place
    pieces += filler[start:]
    return Sample(task, plan.opening + plan.joint.join(pieces), plan.question, plan.parts, plan.distractors)


def documents(
    tasks: Sequence[str],
    length: int,
    tokens: int,
    count_tokens: Callable[[list[str]], Sequence[int]],
    *,
    seed: int = 0,
) -> Iterator[tuple[Sample, int]]:
    """Training samples and their tokens, the tasks in turn, until there are `tokens` tokens. Lengths lie between an
    eighth of `length` and all of it, on a logarithmic scale, so that short distances are learnt on the way."""
    lengths = random.Random(f"nemo_lite longrange lengths {seed}")
    made, index, misses = 0, 0, 0
    while made < tokens:
        task = tasks[index % len(tasks)]
        want = int(length * 2 ** -lengths.uniform(0, 3))
        sized = _sized(task, want, count_tokens, seed, index, "train")
        index += 1
        if sized is None:
            misses += 1
            if misses >= 20 * len(tasks) and not made:
                raise UserError(f"--length {length}: no document of {', '.join(tasks)} is as short; use more tokens")
            continue
        made += sized[1]
        yield sized


# -------------------------------------------------------------------------------------------------------- the command


def counter(tokenizer: Any) -> Callable[[list[str]], list[int]]:
    """count_tokens of a tokenizer."""
    return lambda texts: [len(ids) for ids in tokenizer.encode_batch(texts, special=False)]


def main(argv: Sequence[str] | None = None) -> int:
    """`nemo-lite data longrange`; returns the exit status, raises :class:`UserError` on bad input."""
    from nemo_lite.data.tokenizer import load_tokenizer

    parser = argparse.ArgumentParser(
        prog="nemo-lite data longrange",
        description="Write synthetic long-range tasks as training text, one document a line: needles in filler, "
        "chains of variables, common words, facts about people. What `nemo-lite evaluate --ruler` asks is never in it.",
    )
    parser.add_argument("--to", required=True, type=Path, metavar="OUT.jsonl", help="file to write")
    parser.add_argument("--tokens", required=True, type=int, metavar="N", help="tokens in all, about")
    parser.add_argument("--length", required=True, type=int, metavar="L", help="tokens of the longest documents")
    parser.add_argument(
        "--tasks", default=",".join(TASKS), metavar="TASK[,...]", help=f"of {', '.join(TASKS)} (default: all)"
    )
    parser.add_argument("--tokenizer", default="bytes", help="counts the tokens (default: bytes)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="what is drawn (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    tasks = [task.strip() for task in arguments.tasks.split(",") if task.strip()]
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"--tasks {task}: no such task; there are {', '.join(TASKS)}")
    for name, least in (("tokens", 1), ("length", 1)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} must be {least} or more, not {getattr(arguments, name)}")
    if not tasks:
        raise UserError(f"--tasks names none; there are {', '.join(TASKS)}")
    count_tokens = counter(load_tokenizer(arguments.tokenizer))
    total = written = 0
    by_task = dict.fromkeys(tasks, 0)
    work = arguments.to.with_name(f".{arguments.to.name}.part")
    try:
        arguments.to.parent.mkdir(parents=True, exist_ok=True)
        with work.open("w", encoding="utf-8") as file:
            for sample, count in documents(
                tasks, arguments.length, arguments.tokens, count_tokens, seed=arguments.seed
            ):
                file.write(json.dumps({"text": sample.text, "task": sample.task, "tokens": count}) + "\n")
                total, written = total + count, written + 1
                by_task[sample.task] += 1
        work.replace(arguments.to)
    except OSError as error:
        raise UserError(f"{arguments.to} cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            work.unlink()
    if arguments.json:
        print(json.dumps({"out": str(arguments.to), "documents": written, "tokens": total, "tasks": by_task}))
        return 0
    print(f"{written:,} documents, {total:,} tokens in {arguments.to}")
    print(", ".join(f"{task} {count:,}" for task, count in by_task.items()))
    return 0
