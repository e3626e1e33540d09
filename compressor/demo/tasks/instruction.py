"""Follow an instruction: order, case, format, count, length, JSON."""

import json
from random import Random
from typing import Any

from .. import lexicon as lex
from .scene import Scene, Turn, join

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
    prompt = f"{rng.choice(ORDERS[order][0])} {join(items, rng)}, {', '.join(demands)}."
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
    pairs = join([f"{key} {value}" for key, value in record.items()], rng)
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
