"""Short English sentences from a small grammar, with their dependency trees in Stanford's relations.

Gold trees without a treebank: adjectives, adverbs and prepositional phrases come and go, so that a relation's arc has
no fixed length.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

NOUNS = "dog girl teacher farmer doctor lawyer soldier gardener carpenter horse neighbor tailor violinist".split()
THINGS = "letter house bridge garden picture table wagon basket story machine bottle blanket harpsichord".split()
ADJECTIVES = "old young tired clever small famous angry wealthy quiet green heavy broken".split()
ADVERBS = "quickly slowly carefully quietly eagerly".split()
VERBS = "painted found carried opened moved built repaired bought finished described".split()
PREPOSITIONS = "in with near behind under from".split()


@dataclass
class Tree:
    """A sentence in the making: words, the head of each (0 is the root), relations."""

    words: list[str] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    relations: list[str] = field(default_factory=list)

    def add(self, word: str, head: int = 0, relation: str = "root") -> int:
        """Add a word and return its number, from 1 on."""
        self.words.append(word)
        self.heads.append(head)
        self.relations.append(relation)
        return len(self.words)

    def attach(self, word: int, head: int) -> None:
        self.heads[word - 1] = head


def sentence(draw: random.Random) -> Tree:
    """Return a random active or passive sentence."""
    tree, passive = Tree(), draw.random() < 0.4
    subject = _noun_phrase(tree, draw, "nsubjpass" if passive else "nsubj", THINGS if passive else NOUNS)
    if draw.random() < 0.3:
        _phrase(tree, draw, subject)
    waiting = [subject]
    if passive:
        waiting.append(tree.add("was", relation="auxpass"))
    if draw.random() < 0.5:
        waiting.append(tree.add(draw.choice(ADVERBS), relation="advmod"))
    verb = tree.add(draw.choice(VERBS))
    for word in waiting:
        tree.attach(word, verb)
    if passive:
        by = tree.add("by", verb, "prep")
        tree.attach(_noun_phrase(tree, draw, "pobj", NOUNS), by)
    else:
        tree.attach(_noun_phrase(tree, draw, "dobj", THINGS), verb)
    if draw.random() < 0.5:
        _phrase(tree, draw, verb)
    tree.add(".", verb, "punct")
    return tree


def sentences(count: int, seed: int = 0) -> list[Tree]:
    draw = random.Random(seed)
    return [sentence(draw) for _ in range(count)]


def _noun_phrase(tree: Tree, draw: random.Random, relation: str, nouns: list[str]) -> int:
    """Add a determiner or a possessive, up to two adjectives, and a noun, which is returned without its head."""
    is_owned = draw.random() < 0.3
    before = [tree.add(draw.choice(["his", "her", "their"] if is_owned else ["the", "a", "this"]),
                       relation="poss" if is_owned else "det")]  # fmt: skip
    before += [tree.add(word, relation="amod") for word in draw.sample(ADJECTIVES, draw.choice([0, 0, 1, 1, 2]))]
    noun = tree.add(draw.choice(nouns), relation=relation)
    for word in before:
        tree.attach(word, noun)
    return noun


def _phrase(tree: Tree, draw: random.Random, head: int) -> None:
    preposition = tree.add(draw.choice(PREPOSITIONS), head, "prep")
    tree.attach(_noun_phrase(tree, draw, "pobj", THINGS), preposition)
