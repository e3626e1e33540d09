"""RAG: answer from passages with a citation, or say that they do not tell."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from .. import lexicon as lex
from .scene import Scene, Turn


@dataclass(frozen=True)
class Relation:
    """One kind of fact about a person, {e}: its values, how it is told and asked, and what it is called if untold."""

    values: Sequence[str]
    told: Sequence[str]
    noun: str
    questions: Sequence[str]


RELATIONS = {
    "home": Relation(
        lex.TOWNS,
        ["{e} lives in", "{e} dwells in"],
        "home",
        ["Where does {e} live?", "In which town does {e} live?"],
    ),
    "job": Relation(
        lex.JOBS,
        ["{e} works as a", "{e} serves as a"],
        "job",
        ["What does {e} work as?", "What is the job of {e}?"],
    ),
    "pet": Relation(
        lex.ANIMALS,
        ["{e} keeps a", "{e} owns a"],
        "pet",
        ["Which animal does {e} keep?", "What pet does {e} have?"],
    ),
    "music": Relation(
        lex.INSTRUMENTS,
        ["{e} plays the", "{e} practises the"],
        "instrument",
        ["Which instrument does {e} play?", "What does {e} play?"],
    ),
    "food": Relation(
        lex.FOODS,
        ["{e} likes to eat", "{e} enjoys eating"],
        "favourite food",
        ["What does {e} like to eat?", "Which food does {e} like?"],
    ),
    "door": Relation(
        lex.COLOURS,
        ["{e} painted the door", "{e} coloured the door"],
        "door",
        ["What colour is the door of {e}?", "Which colour has the door of {e}?"],
    ),
    "day": Relation(
        lex.DAYS,
        ["{e} goes to market on", "{e} visits the market on"],
        "market day",
        ["When does {e} go to market?", "On which day does {e} go to market?"],
    ),
}
FILLERS = ("Many people know it.", "It has long been so.", "The neighbours say so.", "Nobody is surprised.")
TOLD = 0.75
MOST_PASSAGES = 3


def rag(rng: Random, *, most_passages: int = MOST_PASSAGES) -> Scene:
    """Two or three passages, each with its number behind it, about few people and few kinds of fact.

    A question mixes a person and a relation of the passages, so that wrong passages share one of the two with it. An
    answer quotes the passage, or says that none tells it.
    """
    people = rng.sample(lex.NAMES, 3)
    kinds = rng.sample(list(RELATIONS), 3)
    pairs = [(who, what) for who in people for what in kinds]
    shown = rng.sample(pairs, rng.randint(min(2, most_passages), most_passages))
    passages, facts = [], {}
    for number, (who, what) in enumerate(shown, 1):
        relation = RELATIONS[what]
        taken = [value for value, *_ in facts.values()]
        value = rng.choice([value for value in relation.values if value not in taken])
        told = f"{rng.choice(relation.told).format(e=who)} {value} [{number}]."
        passages.append(f"{rng.choice(FILLERS) + ' ' if rng.random() < 0.25 else ''}{told}")
        facts[who, what] = value, number, told
    asked = rng.sample(shown, len(shown))

    def ask() -> Turn:
        told = rng.random() < TOLD
        asked.append(asked.pop(0))  # in turn, so that a conversation asks about everything
        who, what = asked[-1] if told else rng.choice([pair for pair in pairs if pair not in facts])
        relation = RELATIONS[what]
        if told:
            value, number, answer = facts[who, what]
            about = [who, what, value]
            check: dict[str, Any] = {"refuses": False, "contains": [value], "cites": [number]}
        else:
            answer = f"{who} may have a {relation.noun}, but the passages do not tell."
            about = [who, what, sorted(shown)]
            check = {"refuses": True, "cites": []}
        question = rng.choice(relation.questions).format(e=who)
        return Turn(about, question, answer, check)

    rule = rng.choice(["Answer from the passages and cite them.", "Use only the passages and cite the one you use."])
    return Scene(ask, system=rule, opening="\n".join(passages) + "\n")
