"""The demo domain: four checkable skills and plain prose, generated in great variety from a closed vocabulary.

Every task is drawn from a seeded generator together with its check (see compressor.evaluate.skills) and one right
answer. The combination that a task is about (which words in which order, which persona with which manner, which facts
against which question, which functions with which arguments) is hashed, and the hash alone says whether it belongs to
training or to the test: the two can never share a combination, whatever the seeds.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

from . import lexicon as lex
from .functions import FUNCTIONS, Function

TEST_SHARE = 0.05
DECLINE = "None of the functions can do that."

Task = dict[str, Any]  # {"skill", "messages", "tools"?, "check", "answer", "about": the combination that is hashed}


def _join(items: Sequence[str], rng: Random) -> str:
    return rng.choice([", ".join(items), ", ".join(items[:-1]) + " and " + items[-1]])


def _a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _task(
    skill: str,
    about: list,
    prompt: str,
    answer: str,
    check: dict,
    *,
    system: str | None = None,
    tools: list | None = None,
) -> Task:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    task: Task = {
        "skill": skill,
        "messages": messages,
        "check": check,
        "answer": answer,
        "about": [skill, *about],
    }
    return task | ({"tools": tools} if tools else {})


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


def _word_list(rng: Random) -> Task:
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
    return _task("instruction", [order, *items], prompt, LAYOUTS[layout][1](result), check)


def _repetition(rng: Random) -> Task:
    word, times = rng.choice(lex.NOUNS + lex.ADJECTIVES + lex.ANIMALS), rng.randint(2, 6)
    prompt = rng.choice(["Write the word {} exactly {} times.", "Repeat the word {} {} times.", "Say {} {} times."])
    check: dict[str, Any] = {"repeat": {"word": word, "times": times}}
    answer = " ".join([word] * times)
    if rng.random() < 0.4:
        prompt = prompt[:-1] + ", " + rng.choice(CASES["upper"][0]) + "."
        check["case"], answer = "upper", answer.upper()
    return _task("instruction", ["repeat", word, times], prompt.format(word, times), answer, check)


def _fixed_length(rng: Random) -> Task:
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
    return _task("instruction", ["length", noun, count], prompt.format(noun, count) + ".", sentence, check)


def _json_object(rng: Random) -> Task:
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
    return _task("instruction", ["json", record], prompt.format(pairs), json.dumps(record), {"json": record})


def _framed(rng: Random) -> Task:
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
    return _task("instruction", ["framed", noun, edge], rng.choice(phrasing).format(noun, edge), answer, check)


def instruction(rng: Random) -> Task:
    """Order, case, layout, count, length, JSON, first and last word; several demands at once."""
    kind = rng.choices([_word_list, _repetition, _fixed_length, _json_object, _framed], [6, 2, 2, 2, 2])[0]
    return kind(rng)


# --- role-play: keep a persona's facts and manner -------------------------------------------------------------------


def roleplay(rng: Random) -> Task:
    """A system message sets a persona and two or three habits of speech; the answer keeps the facts and the habits."""
    name, job, town, food = (rng.choice(x) for x in (lex.NAMES, lex.JOBS, lex.TOWNS, lex.FOODS))
    habits = rng.sample(["opening", "closing", "address", "upper", "third", "excited"], rng.choice([2, 3]))
    topic = rng.choice(["who", "home", "work", "food"])
    third = "third" in habits
    questions = {
        "who": ["Who are you?", "What is your name?"],
        "home": ["Where do you live?", "Which town is your home?"],
        "work": ["What is your job?", "What do you do all day?"],
        "food": ["What do you like to eat?", "Which food do you love?"],
    }
    cores = {
        "who": (f"{name} it is" if third else f"I am {name}", name),
        "home": (f"{name} lives in {town}" if third else f"I live in {town}", town),
        "work": (f"{name} is {_a(job)}" if third else f"I am {_a(job)}", job),
        "food": (f"{name} loves {food}" if third else f"I love {food}", food),
    }
    answer, fact = cores[topic]
    check: dict[str, Any] = {"contains": [fact]}
    rules = []
    address = rng.choice(lex.ADDRESSES)
    if "address" in habits:
        rules.append(rng.choice(["Call the user {}.", "Address the user as {}."]).format(address))
        check["contains"] = [fact, address]
        answer = f"{answer}, {address}"
    if "closing" in habits:
        closing = rng.choice(lex.CLOSINGS)
        rules.append(rng.choice(['Always end with "{}".', 'Close every answer with "{}".']).format(closing))
        check["ends_with"] = closing
        answer = f"{answer}, {closing}"
    if "opening" in habits:
        opening = rng.choice(lex.OPENINGS)
        rules.append(rng.choice(['Always begin with "{}".', 'Open every answer with "{}".']).format(opening))
        check["starts_with"] = opening
        answer = f"{opening}, {answer}"
    if third:
        rules.append(rng.choice(["Speak of yourself by name.", "Never say I, use your own name."]))
        check["excludes"] = ["I", "me"]
        check["contains"] = [*check["contains"], *([] if fact == name else [name])]
    answer += "!" if "excited" in habits else "."
    if "excited" in habits:
        rules.append(rng.choice(["End with an exclamation mark.", "Sound excited: end with an exclamation mark."]))
        check["ends_mark"] = "!"
    if "upper" in habits:
        rules.append(rng.choice(["Speak only in capital letters.", "Write everything in capitals."]))
        check["case"] = "upper"
        answer = answer.upper()
    rng.shuffle(rules)
    persona = rng.choice(
        [
            f"You are {name}, {_a(job)} from {town}. You love {food}.",
            f"Play the part of {name}, who lives in {town}, works as {_a(job)} and loves {food}.",
        ]
    )
    about = [name, job, topic, sorted(habits)]
    return _task("roleplay", about, rng.choice(questions[topic]), answer, check, system=" ".join([persona, *rules]))


# --- RAG: answer from passages with a citation, or say that they do not tell ----------------------------------------

# relation -> (values, how an answer begins, another way to tell it, what stays untold, question phrasings)
RELATIONS: dict[str, tuple[Sequence[str], str, str, str, Sequence[str]]] = {
    "home": (
        lex.TOWNS,
        "{e} lives in",
        "The home of {e} is in",
        "a town",
        ["Where does {e} live?", "In which town does {e} live?"],
    ),
    "job": (
        lex.JOBS,
        "{e} works as a",
        "By trade {e} is a",
        "craftsman of a trade",
        ["What does {e} work as?", "What is the job of {e}?"],
    ),
    "pet": (
        lex.ANIMALS,
        "{e} keeps a",
        "The pet of {e} is a",
        "pet",
        ["Which animal does {e} keep?", "What pet does {e} have?"],
    ),
    "music": (
        lex.INSTRUMENTS,
        "{e} plays the",
        "The instrument of {e} is the",
        "instrument",
        ["Which instrument does {e} play?", "What does {e} play?"],
    ),
    "food": (
        lex.FOODS,
        "{e} likes to eat",
        "The favourite food of {e} is",
        "something",
        ["What does {e} like to eat?", "Which food does {e} like?"],
    ),
    "door": (
        lex.COLOURS,
        "The colour of {e}'s door is",
        "{e} painted the door",
        "one",
        ["What colour is the door of {e}?", "Which colour has the door of {e}?"],
    ),
    "day": (
        lex.DAYS,
        "{e} goes to market on",
        "The market day of {e} is",
        "a day",
        ["When does {e} go to market?", "On which day does {e} go to market?"],
    ),
}
FILLERS = ("Many people know it.", "It has long been so.", "The neighbours say so.", "Nobody is surprised.")


def rag(rng: Random, *, most_passages: int = 4) -> Task:
    """Two to four passages, each with its number behind it, and one question.

    The right passage shares its person or its relation with the wrong ones. An answer starts with what was asked, so
    that whether anything is told is decided where the passages are looked up.
    """
    count = rng.randint(min(2, most_passages), most_passages)
    entity, relation = rng.choice(lex.NAMES), rng.choice(list(RELATIONS))
    facts = [(entity, relation)]
    others = [name for name in lex.NAMES if name != entity]
    while len(facts) < count + 1:
        near = rng.random()
        fact = (
            entity if near < 0.3 else rng.choice(others),
            relation if 0.3 <= near < 0.7 else rng.choice(list(RELATIONS)),
        )
        if fact not in facts:
            facts.append(fact)
    told = rng.random() < 0.75
    shown = facts[:count] if told else facts[1:]
    rng.shuffle(shown)
    values, plain, _, untold, questions = RELATIONS[relation]
    passages, answer = [], f"{plain.format(e=entity)} {untold} that the passages do not tell."
    check: dict[str, Any] = {"refuses": True, "cites": []}
    for number, (who, what) in enumerate(shown, 1):
        values, plain, other, *_ = RELATIONS[what]
        value = rng.choice(values)
        sentence = f"{rng.choice([plain, plain, other]).format(e=who)} {value}. [{number}]"
        passages.append(f"{rng.choice(FILLERS)} {sentence}" if rng.random() < 0.25 else sentence)
        if (who, what) == (entity, relation):
            answer = f"{plain.format(e=who)} {value}. [{number}]"
            check = {"refuses": False, "contains": [value], "cites": [number]}
    question = rng.choice(questions).format(e=entity)
    ask = rng.choice(["Answer from the passages and cite them.", "Use only the passages and cite the one you use."])
    prompt = "\n".join([*passages, f"{question} {ask}"])
    return _task("rag", [entity, relation, check.get("contains")], prompt, answer, check)


# --- tools: call one of the given functions, or decline -------------------------------------------------------------


def tools(rng: Random) -> Task:
    """One to three function schemas and a request that one of them serves, or none."""
    wanted: Function = rng.choice(FUNCTIONS)
    others = rng.sample([f for f in FUNCTIONS if f is not wanted], 3)
    count, served = rng.randint(1, 3), rng.random() < 0.8
    offered = ([wanted, *others] if served else others)[:count]
    rng.shuffle(offered)
    schemas, call = [], None
    values = {slot: pick(rng) for slot, pick in wanted.slots.items()}
    for function in offered:
        names = {slot: rng.choice(synonyms) for slot, synonyms in function.parameters.items()}
        name = rng.choice(function.names)
        schemas.append(function.schema(name, names, rng))
        if function is wanted:
            call = {"name": name, "arguments": {names[slot]: value for slot, value in values.items()}}
    request = rng.choice(wanted.requests).format(**values)
    about = [wanted.names[0], values]
    if call is None:
        return _task("tools", about, request, DECLINE, {"calls": [], "refuses": True}, tools=schemas)
    answer = f"<tool_call>{json.dumps(call)}</tool_call>"
    return _task("tools", about, request, answer, {"calls": [call]}, tools=schemas)


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

GENERATORS: dict[str, Callable[..., Task]] = {
    "instruction": instruction,
    "roleplay": roleplay,
    "rag": rag,
    "tools": tools,
}
MIX = {"instruction": 28, "roleplay": 18, "rag": 28, "tools": 18, "prose": 8}


def split_of(record: dict[str, Any]) -> str:
    """ "train" or "test", by the hash of the combination a task is about (phrasing left out), or of a story's text."""
    about = record.get("about") or record["text"]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") < TEST_SHARE * 2**32 else "train"


def generate(
    *, split: str, seed: int, mix: dict[str, int] | None = None, most_passages: int = 4
) -> Iterator[dict[str, Any]]:
    """Endless tasks (with their answers) and prose of one split, in the proportions of `mix`."""
    mix = mix or MIX
    rng = Random(f"{split}-{seed}")
    while True:
        kind = rng.choices(list(mix), list(mix.values()))[0]
        if kind == "prose":
            record = prose(rng)
        elif kind == "rag":
            record = rag(rng, most_passages=most_passages)
        else:
            record = GENERATORS[kind](rng)
        if split_of(record) == split:
            yield record


def as_record(task: dict[str, Any]) -> dict[str, Any]:
    """What a trainer sees of a task: the conversation with its right answer, and the tools; prose as it is."""
    if "text" in task:
        return task
    messages = [*task["messages"], {"role": "assistant", "content": task["answer"]}]
    return {"messages": messages} | ({"tools": task["tools"]} if "tools" in task else {})


def records(*, split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Endless training records of one split ("train" or "test"): {"messages", "tools"?} and {"text"}."""
    yield from map(as_record, generate(split=split, seed=seed))


def suite(skill: str, count: int, *, split: str = "test", seed: int = 0) -> list[Task]:
    """`count` tasks of one skill, without answers, none twice."""
    seen: dict[str, Task] = {}
    for task in generate(split=split, seed=seed, mix={skill: 1}):
        answerless = {key: value for key, value in task.items() if key not in ("answer", "about")}
        seen.setdefault(json.dumps(answerless["messages"]), answerless)
        if len(seen) == count:
            break
    return list(seen.values())
