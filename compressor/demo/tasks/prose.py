"""Plain prose, so that perplexity has something to measure."""

from random import Random

from .. import lexicon as lex
from .scene import article


def prose(rng: Random) -> dict[str, str]:
    """A little story that keeps its people, places and things straight, so that perplexity has something to measure."""
    who, friend = rng.sample(lex.NAMES, 2)
    thing, other = rng.sample(lex.NOUNS, 2)
    town, job, food, animal, day = (rng.choice(x) for x in (lex.TOWNS, lex.JOBS, lex.FOODS, lex.ANIMALS, lex.DAYS))
    first, second = rng.sample(lex.ADJECTIVES, 2)
    opening = rng.choice(
        [
            f"On {day} {who} the {job} walked through {town} with {article(animal)}.",
            f"{who} was {article(job)} in {town}, and {who} had {article(animal)}.",
            f"There was once {article(job)} in {town} whose name was {who}.",
        ]
    )
    middle = rng.choice(
        [
            f"Under {article(other)} there lay {article(first)} {thing}. Nobody knew whose {thing} it was.",
            f"{who} wanted {article(first)} {thing}, but the market had only {article(second)} {other}.",
            f"A friend named {friend} came by and showed {who} {article(first)} {thing}.",
        ]
    )
    turn = rng.choice(
        [
            f"{friend} said that the {thing} was too {second}, but {who} liked it.",
            f"So {who} gave the {thing} to {friend}, and {friend} gave {who} some {food}.",
            f"{who} carried the {thing} home and put it beside the {other}.",
        ]
    )
    ending = rng.choice(
        [
            f"In the evening {who} and {friend} ate {food} together.",
            f"After that day the {thing} was never {second} again.",
            f"The {animal} slept, and {town} was quiet.",
        ]
    )
    return {"text": " ".join([opening, middle, turn, ending])}
