"""Tasks from WordNet's nouns: the supersense of a definition, whether it fits a word, whether two are of siblings."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .text import TextDataset, check_split

DATA_NOUN = Path("/usr/share/wordnet/data.noun")
"""Where Debian's package wordnet-base puts it."""

SUPERSENSES = {
    "04": "act",
    "05": "animal",
    "06": "artifact",
    "07": "attribute",
    "08": "body",
    "09": "cognition",
    "10": "communication",
    "11": "event",
    "12": "feeling",
    "13": "food",
    "14": "group",
    "15": "location",
    "17": "object",
    "18": "person",
    "19": "phenomenon",
    "20": "plant",
    "21": "possession",
    "22": "process",
    "23": "quantity",
    "24": "relation",
    "25": "shape",
    "26": "state",
    "27": "substance",
    "28": "time",
}
"""The 24 classes by lexicographer file; left out are 03 (Tops, the 51 most general senses) and 16 (motive, 42)."""


@dataclass(frozen=True)
class Synset:
    """One sense.

    words       that have it, the most usual first
    definition  the gloss without its quoted examples, which contain the words
    supersense  one of SUPERSENSES.values()
    hypernym    offset of the next more general synset, the first if there are several
    """

    words: tuple[str, ...]
    definition: str
    supersense: str
    hypernym: str


def supersense(
    test_fraction: float = 0.2, seed: int = 0, count: int | None = None, path: str | Path | None = None
) -> tuple[TextDataset, TextDataset]:
    """(train, test): 82,022 definitions, each with one of 24 classes (Ciaramita & Johnson 2003).

    test_fraction  of the definitions; all senses under one hypernym fall on the same side, so that no
                   near-duplicate of a test text is trained on
    seed           of the split and of the draw
    count          training texts to draw, and test texts in proportion; None for all
    path           data.noun; by default where Debian's package wordnet-base has it

    Raises FileNotFoundError where that is not, ValueError for a file that is not data.noun, a
    fraction outside (0, 1), or a class that no training text has.
    """
    names = list(SUPERSENSES.values())
    sides = []
    for synsets in _split(read_synsets(path), test_fraction, seed):
        labels = [names.index(synset.supersense) for synset in synsets]
        sides.append(TextDataset([synset.definition for synset in synsets], labels, names))
    return _draw(sides, test_fraction, seed, count)


def word_definitions(
    test_fraction: float = 0.2, seed: int = 0, count: int | None = None, path: str | Path | None = None
) -> tuple[TextDataset, TextDataset]:
    """(train, test): 163,732 pairs of a word and a definition, "match" or "no match".

    Each word comes once with its own definition and once with that of a sibling, another sense under
    the same hypernym, or where it has none with one of the same supersense. A definition is as often
    wrong as right, so neither half of a pair gives the answer away. A sibling that shares a word is
    passed over, because its definition may fit too. Arguments and errors as for `supersense`.
    """
    sides = []
    for side, synsets in enumerate(_split(read_synsets(path), test_fraction, seed)):
        pairs = list(_pairs(synsets, random.Random(f"{seed},{side}")))
        words, definitions, labels = (list(column) for column in zip(*pairs, strict=True))
        sides.append(TextDataset(words, labels, ["no match", "match"], definitions))
    return _draw(sides, test_fraction, seed, count)


def sibling_definitions(
    test_fraction: float = 0.2, seed: int = 0, count: int | None = None, path: str | Path | None = None
) -> tuple[TextDataset, TextDataset]:
    """(train, test): pairs of definitions, "siblings" or "unrelated".

    Each definition comes first once before that of a sibling, another sense under the same hypernym, and once
    before that of any other sense, drawn by seed; and second as often, so that neither half of a pair gives the
    answer away. Unlike `word_definitions` it can be learned without pretrained vectors: words of test definitions
    are known from others. Arguments and errors as for `supersense`.
    """
    sides = []
    for side, synsets in enumerate(_split(read_synsets(path), test_fraction, seed)):
        pairs = list(_sibling_pairs(synsets, random.Random(f"{seed},{side}")))
        first, second, labels = (list(column) for column in zip(*pairs, strict=True))
        sides.append(TextDataset(first, labels, ["unrelated", "siblings"], second))
    return _draw(sides, test_fraction, seed, count)


def read_synsets(path: str | Path | None = None) -> list[Synset]:
    """The synsets of data.noun that have one of SUPERSENSES, in file order. Raises as `supersense`."""
    path = DATA_NOUN if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"wordnet: expected data.noun, got none at {path}; apt-get install wordnet-base, or as any user "
            "apt-get download wordnet-base && dpkg -x wordnet-base_*.deb DIR, "
            "and give the path DIR/usr/share/wordnet/data.noun"
        )
    synsets = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if line.startswith("  "):  # the licence
                continue
            try:
                synset = _parse(line)
            except (ValueError, IndexError):
                raise ValueError(
                    f"wordnet: expected a synset of data.noun in {path}, line {number}, got {line[:40]!r}"
                ) from None
            if synset is not None:
                synsets.append(synset)
    return synsets


def _parse(line: str) -> Synset | None:
    """A line as described in wndb(5WN); None for a supersense that is left out."""
    head, gloss = line.split(" | ", 1)
    fields = head.split()
    words_end = 4 + 2 * int(fields[3], 16)
    words = [word.replace("_", " ") for word in fields[4:words_end:2]]
    pointers = fields[words_end + 1 :]
    if len(pointers) != 4 * int(fields[words_end]) or not words or fields[2] != "n":
        raise ValueError
    if fields[1] not in SUPERSENSES:
        return None
    kinds, targets = pointers[::4], pointers[1::4]
    hypernym = next(target for kind, target in zip(kinds, targets, strict=True) if kind in ("@", "@i"))
    definition = re.split(r'[;,:]?\s*"', gloss.strip(), maxsplit=1)[0]
    return Synset(tuple(words), definition, SUPERSENSES[fields[1]], hypernym)


def _split(synsets: Sequence[Synset], test_fraction: float, seed: int) -> tuple[list[Synset], list[Synset]]:
    """(train, test) with each hypernym on one side."""
    if not 0 < test_fraction < 1:
        raise ValueError(f"wordnet: expected a test_fraction in (0, 1), got {test_fraction}")
    sizes = Counter(synset.hypernym for synset in synsets)
    hypernyms = sorted(sizes)
    random.Random(seed).shuffle(hypernyms)
    room, chosen = round(test_fraction * len(synsets)), set()
    for hypernym in hypernyms:
        if sizes[hypernym] <= room:
            chosen.add(hypernym)
            room -= sizes[hypernym]
    return [s for s in synsets if s.hypernym not in chosen], [s for s in synsets if s.hypernym in chosen]


def _pairs(synsets: Sequence[Synset], rng: random.Random) -> Iterator[tuple[str, str, int]]:
    """(word, definition, 0 or 1); each definition about once with either label."""
    siblings: defaultdict[str, list[Synset]] = defaultdict(list)
    groups: defaultdict[str, list[Synset]] = defaultdict(list)
    for synset in synsets:
        siblings[synset.hypernym].append(synset)
    for hypernym, group in siblings.items():
        groups[hypernym if len(group) > 1 else group[0].supersense] += group
    for group in groups.values():
        rng.shuffle(group)
        for i, synset in enumerate(group):
            other = next((other for other in group[i + 1 :] + group[:i] if _unlike(synset, other)), None)
            if other is not None:
                yield synset.words[0], synset.definition, 1
                yield synset.words[0], other.definition, 0


def _sibling_pairs(synsets: Sequence[Synset], rng: random.Random) -> Iterator[tuple[str, str, int]]:
    """(definition, definition, 0 or 1)."""
    families: defaultdict[str, list[Synset]] = defaultdict(list)
    for synset in synsets:
        families[synset.hypernym].append(synset)
    siblings = [(a, b) for family in families.values() for a, b in zip(family, family[1:] + family[:1], strict=True)]
    siblings = [(a, b) for a, b in siblings if a.definition != b.definition]
    others = [b for _, b in siblings]
    rng.shuffle(others)
    for (a, b), other in zip(siblings, others, strict=True):
        if other.hypernym != a.hypernym:
            yield a.definition, b.definition, 1
            yield a.definition, other.definition, 0


def _unlike(a: Synset, b: Synset) -> bool:
    return a.definition != b.definition and {w.lower() for w in a.words}.isdisjoint(w.lower() for w in b.words)


def _draw(
    sides: Sequence[TextDataset], test_fraction: float, seed: int, count: int | None
) -> tuple[TextDataset, TextDataset]:
    train, test = sides
    if count is None:
        check_split(train, test)
        return train, test
    drawn = train.sample(count, seed)
    check_split(drawn, test)
    return drawn, test.sample(round(count * test_fraction / (1 - test_fraction)), seed)
