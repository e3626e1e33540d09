"""The demo domain: four checkable skills and plain prose, generated in great variety from a closed vocabulary.

Every task is drawn from a seeded generator together with its check (see compressor.evaluate.skills) and one right
answer. The combination that a task is about (which words in which order, which persona with which manner, which facts
against which question, which functions with which arguments) is hashed, and the hash alone says whether it belongs to
training or to the test: the two can never share a combination, whatever the seeds.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any

from ..errors import UserError
from . import lexicon as lex
from .functions import FUNCTIONS, Function

SPLITS = {"test": 0.05, "validation": 0.05, "train": 0.9}  # share of the combinations
DECLINE = "None of the functions can do that."

Task = dict[str, Any]  # {"skill", "messages", "tools"?, "check", "answer", "about": the combination that is hashed}


@dataclass(frozen=True)
class Turn:
    """One exchange: what it is about (this is hashed), what the user says, one right answer, and the answer's check."""

    about: list[Any]
    prompt: str
    answer: str
    check: dict[str, Any]


@dataclass(frozen=True)
class Scene:
    """What stays the same while a conversation goes on, and `ask`, which draws one exchange after another."""

    ask: Callable[[], Turn]
    system: str | None = None
    tools: list[dict[str, Any]] | None = None
    opening: str = ""  # shown to the model once, before the first question


def _join(items: Sequence[str], rng: Random) -> str:
    return rng.choice([", ".join(items), ", ".join(items[:-1]) + " and " + items[-1]])


def _a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


# --- instruction: order, case, format, count, length, JSON ----------------------------------------------------------

CASES = {
    "upper": (["in upper case", "in capital letters", "in capitals"], str.upper),
    "lower": (["in lower case", "in small letters"], str.lower),
    "title": (["with capital initials", "each with a capital initial"], str.title),
}
LAYOUTS = {
    "commas": (["separated by commas", "as a comma-separated list"], lambda items: ", ".join(items)),
    "hyphens": (["joined by hyphens", "with hyphens between them"], lambda items: "-".join(items)),
    "numbered": (
        ["as a numbered list"],
        lambda items: "\n".join(f"{i}. {w}" for i, w in enumerate(items, 1)),
    ),
    "bullets": (
        ["as a bullet list", "as a list with dashes"],
        lambda items: "\n".join(f"- {w}" for w in items),
    ),
    "json": (["as a JSON list", "as a JSON array"], json.dumps),
}
ORDERS = {
    "given": (["Write the words", "Give the words", "List the words"], list),
    "alphabetical": (["Write in alphabetical order the words", "Sort from A to Z the words"], sorted),
    "reverse": (["Write in reverse order the words", "List backwards the words"], lambda items: items[::-1]),
}


def _word_list(rng: Random) -> Turn:
    order = rng.choice(list(ORDERS))
    items = rng.sample(lex.NOUNS, rng.choice([2, 3] if order == "alphabetical" else [2, 3, 4]))
    case = rng.choice([None, None, *CASES])
    layout = rng.choice(list(LAYOUTS))
    demands = [rng.choice(LAYOUTS[layout][0])]
    result = ORDERS[order][1](items)
    if case:
        demands.insert(rng.randrange(2), rng.choice(CASES[case][0]))
        result = [CASES[case][1](word) for word in result]
    prompt = f"{rng.choice(ORDERS[order][0])} {_join(items, rng)}, {', '.join(demands)}."
    check = {"list": {"items": result, "layout": layout, **({"case": case} if case else {})}}
    return Turn([order, *items], prompt, LAYOUTS[layout][1](result), check)


def _repetition(rng: Random) -> Turn:
    word, times = rng.choice(lex.NOUNS + lex.ADJECTIVES + lex.ANIMALS), rng.randint(2, 6)
    prompt = rng.choice(["Write the word {} exactly {} times.", "Repeat the word {} {} times.", "Say {} {} times."])
    check: dict[str, Any] = {"repeat": {"word": word, "times": times}}
    answer = " ".join([word] * times)
    if rng.random() < 0.4:
        prompt = prompt[:-1] + ", " + rng.choice(CASES["upper"][0]) + "."
        check["case"], answer = "upper", answer.upper()
    return Turn(["repeat", word, times], prompt.format(word, times), answer, check)


def _fixed_length(rng: Random) -> Turn:
    noun, count = rng.choice(lex.NOUNS), rng.randint(4, 8)
    first, second, third = rng.sample(lex.ADJECTIVES, 3)
    sentence = {
        4: f"The {noun} is {first}.",
        5: f"The {noun} is very {first}.",
        6: f"The {noun} is {first} and {second}.",
        7: f"The {noun} is very {first} and {second}.",
        8: f"The {first} {noun} is very {second} and {third}.",
    }[count]
    prompt = rng.choice(["Describe the {} in exactly {} words", "Write exactly {1} words about the {0}"])
    check: dict[str, Any] = {"word_count": count, "contains": [noun]}
    case = rng.choice([None, None, "upper", "lower"])
    if case:
        check["case"], sentence = case, CASES[case][1](sentence)
        prompt += ", " + rng.choice(CASES[case][0])
    return Turn(["length", noun, count], prompt.format(noun, count) + ".", sentence, check)


def _json_object(rng: Random) -> Turn:
    fields = {
        "name": rng.choice(lex.NAMES),
        "town": rng.choice(lex.TOWNS),
        "age": rng.randint(2, 99),
        "job": rng.choice(lex.JOBS),
        "pet": rng.choice(lex.ANIMALS),
        "colour": rng.choice(lex.COLOURS),
    }
    record = {key: fields[key] for key in rng.sample(list(fields), rng.choice([2, 3, 4]))}
    prompt = rng.choice(["Write a JSON object with {}.", "Answer only with JSON: {}.", "Give as a JSON object {}."])
    pairs = _join([f"{key} {value}" for key, value in record.items()], rng)
    return Turn(["json", record], prompt.format(pairs), json.dumps(record), {"json": record})


def _framed(rng: Random) -> Turn:
    noun, edge = rng.sample(lex.NOUNS, 2)
    adjective = rng.choice(lex.ADJECTIVES)
    if rng.random() < 0.5:
        phrasing = [
            "Write a sentence about the {} that ends with the word {}.",
            "End with {1} a sentence about the {0}.",
        ]
        answer, check = f"The {adjective} {noun} is near the {edge}.", {"ends_with": edge, "contains": [noun]}
    else:
        edge = rng.choice([*lex.DAYS, "Today", "Perhaps", "Once", "Here", "Indeed"])
        phrasing = [
            "Write a sentence about the {} that begins with {}.",
            "Start with {1} a sentence about the {0}.",
        ]
        answer, check = f"{edge} the {noun} is {adjective}.", {"starts_with": edge, "contains": [noun]}
    return Turn(["framed", noun, edge], rng.choice(phrasing).format(noun, edge), answer, check)


def instruction(rng: Random) -> Scene:
    """Order, case, layout, count, length, JSON, first and last word; several demands at once."""
    kinds = [_word_list, _repetition, _fixed_length, _json_object, _framed]
    return Scene(lambda: rng.choices(kinds, [6, 2, 2, 2, 2])[0](rng))


# --- role-play: keep a persona's facts and manner -------------------------------------------------------------------

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
        "work": (f"{name} is {_a(job)}" if third else f"I am {_a(job)}", job),
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
            f"You are {name}, {_a(job)} from {town}. You love {food}.",
            f"Play the part of {name}, who lives in {town}, works as {_a(job)} and loves {food}.",
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


# --- RAG: answer from passages with a citation, or say that they do not tell ----------------------------------------


@dataclass(frozen=True)
class Relation:
    """One kind of fact about a person, {e}: its values and how it is told, asked and found untold."""

    values: Sequence[str]
    plain: str  # an answer begins like this
    other: str  # another way to tell it
    untold: str
    questions: Sequence[str]


RELATIONS = {
    "home": Relation(
        lex.TOWNS,
        "{e} lives in",
        "The home of {e} is in",
        "a town",
        ["Where does {e} live?", "In which town does {e} live?"],
    ),
    "job": Relation(
        lex.JOBS,
        "{e} works as a",
        "By trade {e} is a",
        "craftsman of a trade",
        ["What does {e} work as?", "What is the job of {e}?"],
    ),
    "pet": Relation(
        lex.ANIMALS,
        "{e} keeps a",
        "The pet of {e} is a",
        "pet",
        ["Which animal does {e} keep?", "What pet does {e} have?"],
    ),
    "music": Relation(
        lex.INSTRUMENTS,
        "{e} plays the",
        "The instrument of {e} is the",
        "instrument",
        ["Which instrument does {e} play?", "What does {e} play?"],
    ),
    "food": Relation(
        lex.FOODS,
        "{e} likes to eat",
        "The favourite food of {e} is",
        "something",
        ["What does {e} like to eat?", "Which food does {e} like?"],
    ),
    "door": Relation(
        lex.COLOURS,
        "The colour of {e}'s door is",
        "{e} painted the door",
        "one",
        ["What colour is the door of {e}?", "Which colour has the door of {e}?"],
    ),
    "day": Relation(
        lex.DAYS,
        "{e} goes to market on",
        "The market day of {e} is",
        "a day",
        ["When does {e} go to market?", "On which day does {e} go to market?"],
    ),
}
FILLERS = ("Many people know it.", "It has long been so.", "The neighbours say so.", "Nobody is surprised.")
TOLD = 0.75
MOST_PASSAGES = 3


def rag(rng: Random, *, most_passages: int = MOST_PASSAGES) -> Scene:
    """Two or three passages, each with its number behind it, about few people and few kinds of fact.

    A question mixes a person and a relation of the passages, so that wrong passages share one of the two with it. An
    answer starts with what was asked: whether anything is told is decided where the passages are looked up.
    """
    people = rng.sample(lex.NAMES, 3)
    kinds = rng.sample(list(RELATIONS), 3)
    pairs = [(who, what) for who in people for what in kinds]
    shown = rng.sample(pairs, rng.randint(min(2, most_passages), most_passages))
    passages, facts = [], {}
    for number, (who, what) in enumerate(shown, 1):
        relation = RELATIONS[what]
        taken = [value for value, _ in facts.values()]
        value = rng.choice([value for value in relation.values if value not in taken])
        told = rng.choice([relation.plain, relation.plain, relation.other]).format(e=who)
        passages.append(f"{rng.choice(FILLERS) + ' ' if rng.random() < 0.25 else ''}{told} {value} [{number}].")
        facts[who, what] = value, number

    def ask() -> Turn:
        told = rng.random() < TOLD
        who, what = rng.choice(shown if told else [pair for pair in pairs if pair not in facts])
        relation = RELATIONS[what]
        begin = relation.plain.format(e=who)
        if told:
            value, number = facts[who, what]
            about = [who, what, value]
            answer, check = f"{begin} {value} [{number}].", {"refuses": False, "contains": [value], "cites": [number]}
        else:
            answer = f"{begin} {relation.untold} that the passages do not tell."
            about = [who, what, sorted(shown)]
            check = {"refuses": True, "cites": []}
        question = rng.choice(relation.questions).format(e=who)
        return Turn(about, question, answer, check)

    rule = rng.choice(["Answer from the passages and cite them.", "Use only the passages and cite the one you use."])
    return Scene(ask, system=rule, opening="\n".join(passages) + "\n")


# --- tools: call one of the given functions, or decline -------------------------------------------------------------

SERVED = 0.8


def tools(rng: Random) -> Scene:
    """One to three function schemas, and requests that one of them serves, or none."""
    offered = {}  # function -> its name and the names of its parameters in this scene
    schemas = []
    for function in rng.sample(FUNCTIONS, rng.randint(1, 3)):
        name = rng.choice(function.names)
        names = {slot: rng.choice(synonyms) for slot, synonyms in function.parameters.items()}
        offered[function.names[0]] = name, names
        schemas.append(function.schema(name, names, rng))
    able = [function for function in FUNCTIONS if function.names[0] in offered]
    unable = [function for function in FUNCTIONS if function.names[0] not in offered]

    def ask() -> Turn:
        function: Function = rng.choice(able if rng.random() < SERVED else unable)
        values = {slot: pick(rng) for slot, pick in function.slots.items()}
        request = rng.choice(function.requests).format(**values)
        about = [function.names[0], values]
        if function in unable:
            return Turn(about, request, DECLINE, {"calls": [], "refuses": True})
        name, names = offered[function.names[0]]
        call = {"name": name, "arguments": {names[slot]: value for slot, value in values.items()}}
        return Turn(about, request, f"<tool_call>{json.dumps(call)}</tool_call>", {"calls": [call]})

    return Scene(ask, tools=schemas)


# --- plain prose ----------------------------------------------------------------------------------------------------


def prose(rng: Random) -> dict[str, str]:
    """A little story that keeps its people, places and things straight, so that perplexity has something to measure."""
    who, friend = rng.sample(lex.NAMES, 2)
    thing, other = rng.sample(lex.NOUNS, 2)
    town, job, food, animal, day = (rng.choice(x) for x in (lex.TOWNS, lex.JOBS, lex.FOODS, lex.ANIMALS, lex.DAYS))
    first, second = rng.sample(lex.ADJECTIVES, 2)
    opening = rng.choice(
        [
            f"On {day} {who} the {job} walked through {town} with {_a(animal)}.",
            f"{who} was {_a(job)} in {town}, and {who} had {_a(animal)}.",
            f"There was once {_a(job)} in {town} whose name was {who}.",
        ]
    )
    middle = rng.choice(
        [
            f"Under {_a(other)} there lay {_a(first)} {thing}. Nobody knew whose {thing} it was.",
            f"{who} wanted {_a(first)} {thing}, but the market had only {_a(second)} {other}.",
            f"A friend named {friend} came by and showed {who} {_a(first)} {thing}.",
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


# --- streams and suites ---------------------------------------------------------------------------------------------

SCENES: dict[str, Callable[..., Scene]] = {
    "instruction": instruction,
    "roleplay": roleplay,
    "rag": rag,
    "tools": tools,
}
MIX = {"instruction": 28, "roleplay": 14, "rag": 28, "tools": 22, "prose": 8}
MOST_TURNS = 4


def split_of(about: Any) -> str:
    """A name among SPLITS, by the hash of the combination a turn is about (phrasing left out), or of a story's text."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).digest()
    place = int.from_bytes(digest[:4], "big") / 2**32
    for name, share in SPLITS.items():
        if place < share:
            return name
        place -= share
    return name


def generate(
    *, split: str, seed: int, mix: dict[str, int] | None = None, most_turns: int = 1, most_passages: int = MOST_PASSAGES
) -> Iterator[Task]:
    """Endless tasks (with their answers) and prose of one split, in the proportions of `mix`.

    With most_turns > 1 a task ends a conversation of one to that many exchanges; those of other splits are left out.
    """
    mix = mix or MIX
    rng = Random(f"{split}-{seed}")
    while True:
        skill = rng.choices(list(mix), list(mix.values()))[0]
        if skill == "prose":
            record = prose(rng)
            if split_of(record["text"]) == split:
                yield record
            continue
        scene = rag(rng, most_passages=most_passages) if skill == "rag" else SCENES[skill](rng)
        turns = [scene.ask() for _ in range(rng.randint(1, most_turns))]
        turns = [turn for turn in turns if split_of([skill, *turn.about]) == split]
        if not turns:
            continue
        messages = [{"role": "system", "content": scene.system}] if scene.system else []
        for number, turn in enumerate(turns):
            messages.append({"role": "user", "content": ("" if number else scene.opening) + turn.prompt})
            messages.append({"role": "assistant", "content": turn.answer})
        task = {"skill": skill, "messages": messages[:-1], "check": turns[-1].check, "answer": turns[-1].answer}
        yield task | {"about": [skill, *turns[-1].about]} | ({"tools": scene.tools} if scene.tools else {})


def as_record(task: Task) -> dict[str, Any]:
    """What a trainer sees of a task: the conversation with its right answer, and the tools; prose as it is."""
    if "text" in task:
        return task
    messages = [*task["messages"], {"role": "assistant", "content": task["answer"]}]
    return {"messages": messages} | ({"tools": task["tools"]} if "tools" in task else {})


def records(*, split: str, seed: int, most_passages: int = MOST_PASSAGES) -> Iterator[dict[str, Any]]:
    """Endless training records of one split: {"messages", "tools"?} of up to MOST_TURNS exchanges, and {"text"}."""
    stream = generate(split=split, seed=seed, most_turns=MOST_TURNS, most_passages=most_passages)
    yield from map(as_record, stream)


def suite(skill: str, count: int, *, split: str = "test", seed: int = 0, draws: int = 100) -> list[Task]:
    """`count` tasks of one exchange of one skill, without answers, none twice.

    Raises UserError where `draws` for each task wanted do not bring so many: the skill has fewer.
    """
    seen: dict[str, Task] = {}
    for task in islice(generate(split=split, seed=seed, mix={skill: 1}), draws * count):
        answerless = {key: value for key, value in task.items() if key not in ("answer", "about")}
        seen.setdefault(json.dumps([task["messages"], task.get("tools")]), answerless)
        if len(seen) == count:
            return list(seen.values())
    raise UserError(f"the {skill} suite has {len(seen)} tasks; expected {count}; ask for fewer prompts")
