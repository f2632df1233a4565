"""Facts in prose, after bAbI's tasks 1 to 3 (Weston et al. 2015, arXiv 1502.05698), as BABILong hides them in text
(Kuratov et al. 2024, arXiv 2406.10149): people move between rooms, take things and put them down.

A story is a list of facts, one a document, in order; the question is about its end:
1. where a person is (their last move), 2. where a thing is (its carrier's last move with it), 3. where a thing was
before the place where it is. Stories are drawn until the question has one answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from lrsa.data.examples import Document, Example
from lrsa.data.ruler import one_question

PEOPLE = ("Mary", "John", "Sandra", "Daniel")
PLACES = ("kitchen", "bathroom", "bedroom", "hallway", "office", "garden")
THINGS = ("football", "milk", "apple")
MOVED = ("moved to", "went to", "journeyed to", "travelled to", "went back to")
TOOK = ("took", "got", "picked up", "grabbed")
LEFT = ("dropped", "put down", "discarded", "left")

BABI_ARGS: dict[str, Any] = {
    "supporting": 1,  # facts that the answer needs, at least: bAbI's task 1, 2 or 3
    "facts": None,  # of a story; None: 8, 16 or 32
    "instruction": "Facts about where people and things are lie hidden in the following text, in the order in which "
    "they happened. Read it, then answer the question with one word, the place.",
}
_FACTS = {1: 8, 2: 16, 3: 32}
_TRIES = 1000


@dataclass
class _Story:
    """What is true after `facts`. `moved`: each person's last move; `path`: each thing's places in order, each with
    the numbers of the facts that put it there."""

    facts: list[str] = field(default_factory=list)
    place: dict[str, str] = field(default_factory=dict)  # of a person
    moved: dict[str, int] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)  # of a thing in hand
    taken: dict[str, int] = field(default_factory=dict)
    hidden: dict[str, str] = field(default_factory=dict)  # where a thing lies
    path: dict[str, list[tuple[str, set[int]]]] = field(default_factory=dict)

    def step(self, rng: random.Random) -> None:
        """One more fact: half the time someone takes or leaves a thing, where someone can."""
        hands = [(who, thing) for thing, who in self.holder.items()]
        within_reach = [
            (who, thing)
            for who in PEOPLE
            for thing in THINGS
            if thing not in self.holder and self.place.get(who) == self.hidden[thing]
        ]
        if (hands or within_reach) and rng.random() < 0.5:
            who, thing = rng.choice(hands + within_reach)
            if thing in self.holder:
                self._leave(who, thing, rng)
            else:
                self._take(who, thing, rng)
        else:
            who = rng.choice(PEOPLE)
            self._move(who, rng.choice([place for place in PLACES if place != self.place.get(who)]), rng)

    def _move(self, who: str, place: str, rng: random.Random) -> None:
        self.place[who], self.moved[who] = place, len(self.facts)
        for thing, holder in self.holder.items():
            if holder == who:
                self.path[thing].append((place, {self.taken[thing], len(self.facts)}))
        self.facts.append(f"{who} {rng.choice(MOVED)} the {place}.")

    def _take(self, who: str, thing: str, rng: random.Random) -> None:
        self.holder[thing], self.taken[thing] = who, len(self.facts)
        if thing not in self.path:
            self.path[thing] = [(self.place[who], {self.moved[who], len(self.facts)})]
        self.facts.append(f"{who} {rng.choice(TOOK)} the {thing}.")

    def _leave(self, who: str, thing: str, rng: random.Random) -> None:
        del self.holder[thing]
        self.hidden[thing] = self.place[who]
        self.path[thing][-1][1].add(len(self.facts))
        self.facts.append(f"{who} {rng.choice(LEFT)} the {thing}.")

    def ask(self, supporting: int, rng: random.Random) -> tuple[str, str, set[int]] | None:
        """Question, answer and the numbers of the facts it needs; None where nothing of this kind can be asked."""
        if supporting == 1:
            who = rng.choice(sorted(self.place))
            return f"Where is {who}?", self.place[who], {self.moved[who]}
        # a thing that has moved, so that the place where it was taken is not the answer to task 2
        things = [thing for thing, path in self.path.items() if len(path) > 1]
        if supporting == 3:  # `before the office` says nothing clear of a thing that was there twice
            things = [t for t in things if [place for place, _ in self.path[t]].count(self.path[t][-1][0]) == 1]
        if not things:
            return None
        thing = rng.choice(sorted(things))
        *_, (before, earlier), (now, later) = self.path[thing]
        if supporting == 2:
            return f"Where is the {thing}?", now, later
        return f"Where was the {thing} before the {now}?", before, earlier | later


def draw_babi(args: dict[str, Any], questions: int, rng: random.Random, prefix: str) -> list[Example]:
    """One story of `facts` facts and a question about it; a document a fact, those that the answer needs supporting.

    Raises:
        ValueError: `supporting` other than 1, 2, 3; so few `facts` that no story has such a question.
    """
    one_question(questions, "babi")
    supporting = args["supporting"]
    if supporting not in _FACTS:
        raise ValueError(f"args.supporting={supporting!r} must be 1, 2 or 3")
    count = _FACTS[supporting] if args["facts"] is None else args["facts"]
    if not isinstance(count, int) or count < 2 * supporting:
        raise ValueError(f"args.facts={count!r} must be a whole number, at least {2 * supporting}")
    for _ in range(_TRIES):
        story = _Story(hidden={thing: rng.choice(PLACES) for thing in THINGS})
        for _ in range(count):
            story.step(rng)
        asked = story.ask(supporting, rng)
        if asked is not None:
            question, answer, needed = asked
            documents = (Document(f"fact {number}", fact, number in needed) for number, fact in enumerate(story.facts))
            return [Example(f"{prefix}-0", question, (answer,), tuple(documents))]
    raise ValueError(f"args.facts={count}: no story in {_TRIES} has such a question; ask for more facts")
