"""Tools: call one of the given functions, or decline."""

import json
from random import Random

from ..functions import FUNCTIONS, SYNONYMS, Function
from .scene import Scene, Turn

DECLINE = "I call none of the functions."
SERVED = 0.75


def tools(rng: Random) -> Scene:
    """One to three function schemas that name like parameters alike, and requests that one of them serves, or none."""
    parameters = {slot: rng.choice(synonyms) for slot, synonyms in SYNONYMS.items()}
    offered = {}  # function -> its name in this scene
    schemas = []
    for function in rng.sample(FUNCTIONS, rng.randint(1, 3)):
        offered[function.names[0]] = rng.choice(function.names)
        schemas.append(function.schema(offered[function.names[0]], parameters, rng))
    able = [function for function in FUNCTIONS if function.names[0] in offered]
    unable = [function for function in FUNCTIONS if function.names[0] not in offered]

    def ask() -> Turn:
        function: Function = rng.choice(able if rng.random() < SERVED else unable)
        values = {slot: pick(rng) for slot, pick in function.slots.items()}
        request = rng.choice(function.requests).format(**values)
        about = [function.names[0], values]
        if function in unable:
            return Turn(about, request, DECLINE, {"calls": [], "refuses": True})
        name = offered[function.names[0]]
        call = {"name": name, "arguments": {parameters[slot]: value for slot, value in values.items()}}
        return Turn(about, request, f"I call {name}. <tool_call>{json.dumps(call)}</tool_call>", {"calls": [call]})

    return Scene(ask, tools=schemas)
