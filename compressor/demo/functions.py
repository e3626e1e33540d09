"""The callable functions of the demo domain: names, parameter names, descriptions and requests, each in several wordings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from . import lexicon as lex

TYPES = {"count": "integer", "hour": "integer"}  # every other slot is a string


@dataclass(frozen=True)
class Function:
    """One function: what it may be called, its slots with their parameter names and values, and how people ask for it."""

    names: list[str]
    descriptions: list[str]
    slots: dict[str, Callable[[Random], Any]]  # slot -> draws a value
    requests: list[str]

    def schema(self, name: str, names: dict[str, str], rng: Random) -> dict[str, Any]:
        """The JSON schema offered to the model, in the form of OpenAI and Hugging Face chat templates."""
        properties = {names[slot]: {"type": TYPES.get(slot, "string")} for slot in self.slots}
        return {
            "type": "function",
            "function": {
                "name": name,
                "description": rng.choice(self.descriptions),
                "parameters": {"type": "object", "properties": properties, "required": list(properties)},
            },
        }


def _one_of(values: Sequence[str]) -> Callable[[Random], str]:
    return lambda rng: rng.choice(values)


_DRAW: dict[str, Callable[[Random], Any]] = {
    "town": _one_of(lex.TOWNS),
    "person": _one_of(lex.NAMES),
    "thing": _one_of(lex.NOUNS),
    "food": _one_of(lex.FOODS),
    "animal": _one_of(lex.ANIMALS),
    "colour": _one_of(lex.COLOURS),
    "day": _one_of(lex.DAYS),
    "instrument": _one_of(lex.INSTRUMENTS),
    "count": lambda rng: rng.randint(2, 9),
    "hour": lambda rng: rng.randint(1, 12),
}
SYNONYMS = {
    "town": ["city", "town", "place"],
    "person": ["person", "name", "contact"],
    "thing": ["item", "object", "thing"],
    "food": ["food", "dish", "meal"],
    "animal": ["animal", "pet"],
    "colour": ["colour", "shade"],
    "day": ["day", "date"],
    "instrument": ["instrument", "sound"],
    "count": ["count", "amount", "number"],
    "hour": ["hour", "time"],
}


def _function(names: str, slots: str, descriptions: list[str], requests: list[str]) -> Function:
    return Function(names.split(), descriptions, {slot: _DRAW[slot] for slot in slots.split()}, requests)


FUNCTIONS = [
    _function(
        "get_weather weather_report",
        "town",
        ["Get the weather", "Tell the weather of a place"],
        ["What is the weather in {town}?", "Tell me the weather in {town}.", "Will it rain in {town}?"],
    ),
    _function(
        "book_train buy_ticket",
        "town day",
        ["Book a train ticket", "Buy a train ticket for a day"],
        ["Book a train to {town} on {day}.", "I need a train ticket to {town} for {day}."],
    ),
    _function(
        "send_message write_to",
        "person thing",
        ["Send a message to a person", "Write to somebody about something"],
        ["Send {person} a message about the {thing}.", "Write to {person} about the {thing}."],
    ),
    _function(
        "call_person phone",
        "person",
        ["Call a person", "Phone somebody"],
        ["Call {person}.", "Please phone {person}.", "Ring up {person} now."],
    ),
    _function(
        "set_alarm wake_me",
        "hour",
        ["Set an alarm", "Wake the user at an hour"],
        ["Wake me at {hour}.", "Set an alarm for {hour}."],
    ),
    _function(
        "order_food order_meal",
        "food count",
        ["Order food", "Order a meal, some number of times"],
        ["Order {food} {count} times.", "Order {count} portions of {food}."],
    ),
    _function(
        "find_recipe search_recipe",
        "food",
        ["Find a recipe", "Search a recipe for a dish"],
        ["Find a recipe for {food}.", "How do I cook {food}?"],
    ),
    _function(
        "play_music start_music",
        "instrument",
        ["Play music", "Start music on an instrument"],
        ["Play some {instrument} music.", "I want to hear the {instrument}."],
    ),
    _function(
        "buy_item shop_for",
        "thing colour",
        ["Buy an item", "Shop for a thing of a colour"],
        ["Buy a {colour} {thing}.", "I want to buy a {thing} that is {colour}."],
    ),
    _function(
        "paint_item change_colour",
        "thing colour",
        ["Paint a thing", "Change the colour of a thing"],
        ["Paint the {thing} {colour}.", "Give the {thing} a {colour} coat."],
    ),
    _function(
        "feed_animal give_food",
        "animal food",
        ["Feed an animal", "Give food to a pet"],
        ["Feed the {animal} some {food}.", "Give the {animal} {food} to eat."],
    ),
    _function(
        "find_vet call_vet",
        "animal town",
        ["Find a vet", "Find a doctor for an animal in a place"],
        ["Find a vet for my {animal} in {town}.", "My {animal} is ill, which vet is in {town}?"],
    ),
    _function(
        "plan_meeting add_meeting",
        "person day",
        ["Plan a meeting", "Add a meeting with a person"],
        ["Plan a meeting with {person} on {day}.", "I will meet {person} on {day}, note it."],
    ),
    _function(
        "find_hotel book_hotel",
        "town count",
        ["Find a hotel", "Book a hotel for some nights"],
        ["Find a hotel in {town} for {count} nights.", "I stay {count} nights in {town}, book a hotel."],
    ),
    _function(
        "count_items check_stock",
        "thing",
        ["Count items in stock", "Check the stock of an item"],
        ["How many of the {thing} are in stock?", "Check the stock of the {thing}."],
    ),
    _function(
        "get_map show_map",
        "town",
        ["Show a map", "Get the map of a place"],
        ["Show me a map of {town}.", "I need the map of {town}."],
    ),
]
