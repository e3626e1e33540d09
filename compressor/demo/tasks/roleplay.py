"""Play a role: keep a persona's facts and manner."""

from random import Random
from typing import Any

from .. import lexicon as lex
from .scene import Scene, Turn, article

TOPICS = {
    "who": ["Who are you?", "What is your name?"],
    "home": ["Where do you live?", "Which town is your home?"],
    "work": ["What is your job?", "What do you do all day?"],
    "food": ["What do you like to eat?", "Which food do you love?"],
}
HABITS = ("opening", "closing", "address", "upper", "third", "excited")


def roleplay(rng: Random) -> Scene:
    """A system message sets a persona and two or three habits of speech; the answers keep the facts and the habits."""
    name, job, town, food = (rng.choice(x) for x in (lex.NAMES, lex.JOBS, lex.TOWNS, lex.FOODS))
    opening, closing, address = (rng.choice(x) for x in (lex.OPENINGS, lex.CLOSINGS, lex.ADDRESSES))
    habits = rng.sample(HABITS, rng.choice([2, 3]))
    topics = rng.sample(list(TOPICS), len(TOPICS))
    third = "third" in habits
    cores = {
        "who": (f"{name} it is" if third else f"I am {name}", name),
        "home": (f"{name} lives in {town}" if third else f"I live in {town}", town),
        "work": (f"{name} is {article(job)}" if third else f"I am {article(job)}", job),
        "food": (f"{name} loves {food}" if third else f"I love {food}", food),
    }
    rules = {
        "opening": ['Always begin with "{}".', 'Open every answer with "{}".'],
        "closing": ['Always end with "{}".', 'Close every answer with "{}".'],
        "address": ["Call the user {}.", "Address the user as {}."],
        "third": ["Speak of yourself by name.", "Never say I, use your own name."],
        "excited": ["End with an exclamation mark.", "Sound excited: end with an exclamation mark."],
        "upper": ["Speak only in capital letters.", "Write everything in capitals."],
    }
    fillings = {"opening": opening, "closing": closing, "address": address}
    manner = [rng.choice(rules[habit]).format(fillings.get(habit)) for habit in habits]
    persona = rng.choice(
        [
            f"You are {name}, {article(job)} from {town}. You love {food}.",
            f"Play the part of {name}, who lives in {town}, works as {article(job)} and loves {food}.",
        ]
    )

    def ask() -> Turn:
        topics.append(topics.pop(0))  # in turn, so that a conversation asks about everything
        topic = topics[-1]
        answer, fact = cores[topic]
        check: dict[str, Any] = {"contains": [fact]}
        if "address" in habits:
            check["contains"] += [address]
            answer = f"{answer}, {address}"
        if "closing" in habits:
            check["ends_with"] = closing
            answer = f"{answer}, {closing}"
        if "opening" in habits:
            check["starts_with"] = opening
            answer = f"{opening}, {answer}"
        if third:
            check["excludes"] = ["I", "me"]
            check["contains"] += [] if fact == name else [name]
        answer += "!" if "excited" in habits else "."
        if "excited" in habits:
            check["ends_mark"] = "!"
        if "upper" in habits:
            check["case"] = "upper"
            answer = answer.upper()
        return Turn([name, job, topic, sorted(habits)], rng.choice(TOPICS[topic]), answer, check)

    return Scene(ask, system=" ".join([persona, *manner]))
