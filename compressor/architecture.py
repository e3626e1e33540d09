"""From a target to one Shape, without a search.

The rule is the practice of Minitron (arXiv 2408.11796, section 2 and table 3): for a size target keep the
layers and all attention heads, and cut hidden and ffn together at nearly the teacher's ratio; a depth target
cuts layers only. Sizes snap to the coarsest of 256, 64 and 32 that allows both the ratio and the target:
matrix kernels and block quantizers (blocks of 32 to 256 weights) like these. Finer steps serve models too
small for them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.resources import files
from math import ceil, floor, lcm, log
from typing import Any

from .errors import UserError
from .families import family
from .shape import BITS, Shape

# Published models whose configs are shipped: the name used here, and the Hub id it stands for.
PUBLISHED = {
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-minitron-4b-width": "nvidia/Llama-3.1-Minitron-4B-Width-Base",
    "llama-3.1-minitron-4b-depth": "nvidia/Llama-3.1-Minitron-4B-Depth-Base",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "mistral-7b-v0.1": "mistralai/Mistral-7B-v0.1",
    "mistral-nemo-12b": "mistralai/Mistral-Nemo-Base-2407",
    "mn-minitron-8b": "nvidia/Mistral-NeMo-Minitron-8B-Base",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-8b": "Qwen/Qwen3-8B",
}

TOLERANCE = 0.05  # a student's parameters lie within this share of the target
STEPS = (256, 64, 32)  # sizes that hardware and block quantizers like, coarsest first
FINE_STEPS = (16, 8, 4, 2, 1)  # only where no multiple of 32 meets the target
RATIO_TOLERANCE = 0.10  # how far ffn / hidden may move (as a log) before a finer step is tried
BLOCK = 32  # the smallest block of the int4 and int8 quantizers

COUNTS = {"k": 10**3, "m": 10**6, "b": 10**9}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SIZES = {"layers": "num_layers", "hidden": "hidden", "ffn": "ffn", "heads": "num_heads"}

FORMS = (
    "4b or 350m (total parameters), 50% (of the teacher's parameters), 2GiB@int4 (bytes of the weights), "
    "layers=16, hidden=3072,ffn=9216 (also heads=), or a published shape such as llama-3.1-minitron-4b-width"
)


@dataclass(frozen=True)
class Target:
    """A parsed `--target`.

    kind is "parameters" (amount: a count), "fraction" (amount: 0 to 1), "bytes" (amount: bytes at
    `precision`), "sizes" (sizes: pairs of a Shape field and its value) or "named" (name: a shipped config).
    """

    text: str
    kind: str
    amount: float = 0.0
    precision: str = ""
    sizes: tuple[tuple[str, int], ...] = ()
    name: str = ""


def parse_target(text: str) -> Target:
    """Read a target as typed. Raises UserError that names the accepted forms."""
    plain = str(text).strip()
    flags = re.IGNORECASE | re.ASCII
    number = r"(\d+(?:\.\d+)?|\.\d+)"
    if found := re.fullmatch(number + r"([kmb])", plain, flags):
        count = float(found[1]) * COUNTS[found[2].lower()]
        if count >= 1:
            return Target(text=plain, kind="parameters", amount=count)
    elif found := re.fullmatch(number + r"%", plain, flags):
        if 0 < float(found[1]) < 100:
            return Target(text=plain, kind="fraction", amount=float(found[1]) / 100)
    elif found := re.fullmatch(number + r"([kmg]i?b)@(\w+)", plain, flags):
        unit = next(size for name, size in UNITS.items() if name.lower() == found[2].lower())
        if found[3].lower() in BITS and float(found[1]) > 0:
            return Target(text=plain, kind="bytes", amount=floor(float(found[1]) * unit), precision=found[3].lower())
    elif "=" in plain:
        return Target(text=plain, kind="sizes", sizes=_parse_sizes(plain))
    elif plain.lower() in PUBLISHED:
        return Target(text=plain, kind="named", name=plain.lower())
    near = get_close_matches(plain.lower(), PUBLISHED, n=1, cutoff=0.75)
    hint = f"did you mean {near[0]}?" if near else "write the target in one of these forms"
    raise UserError(f"target {plain!r} is not understood; expected {FORMS}; {hint}")


def _parse_sizes(text: str) -> tuple[tuple[str, int], ...]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in SIZES:
            raise UserError(
                f"target {text!r} sets {key!r}; what can be set is {', '.join(SIZES)} "
                "(KV heads, head_dim and the vocabulary stay the teacher's); remove it"
            )
        if not re.fullmatch(r"[1-9][0-9]*", value):
            raise UserError(f"target {text!r} has {key}={value!r}; expected a whole number of at least 1; correct it")
        if SIZES[key] in sizes:
            raise UserError(f"target {text!r} sets {key} twice; expected it once; remove one")
        sizes[SIZES[key]] = int(value)
    return tuple(sizes.items())


def choose(target: Target, teacher: Shape) -> Shape:
    """The student Shape for a target, by the rule in this module's docstring.

    Size targets are met within 5 % of the parameters asked for; a bytes target is a budget, so that the
    student's weights take between 95 % and 100 % of it. Raises UserError when the teacher is already as small
    as the target, when the target is out of reach, or when sizes were asked for that this teacher cannot be
    cut to.
    """
    if target.kind == "named":
        student = _fits_inside(target, Shape.from_config(named_config(target.name)), teacher)
    elif target.kind == "sizes":
        student = _explicit(target, teacher)
    else:
        student = _cut_width(target, teacher)
    if student == teacher:
        raise UserError(
            f"target {target.text} is the teacher itself ({teacher.parameters:,} parameters); "
            "expected something smaller; lower the target"
        )
    return student


def named_config(name: str) -> dict[str, Any]:
    """The public config of a published shape, shipped as data. Raises UserError that lists the names."""
    key = name.lower()
    if key not in PUBLISHED:
        near = get_close_matches(key, PUBLISHED, n=1)
        raise UserError(
            f"no published shape is called {name!r}; shipped are {', '.join(PUBLISHED)}; "
            + (f"did you mean {near[0]}?" if near else "use one of these, a folder or a Hub id")
        )
    return json.loads((files("compressor") / "configs" / f"{key}.json").read_text(encoding="utf-8"))


def _explicit(target: Target, teacher: Shape) -> Shape:
    """The teacher with the sizes asked for; refuses what cannot be cut and what quantizers cannot hold."""
    for name, value in target.sizes:
        most = getattr(teacher, name)
        key = next(key for key, field in SIZES.items() if field == name)
        if value > most:
            raise UserError(
                f"target {target.text} asks for {key}={value} but the teacher has {most}; "
                "expected at most the teacher's; lower it"
            )
        if name == "num_layers" and value < min(2, most):
            raise UserError(
                f"target {target.text} leaves {value} layer; a depth cut keeps the first and the last layer; "
                "use layers=2 or more"
            )
    sizes = dict(target.sizes)
    for name in ("hidden", "ffn"):
        step = _explicit_step(name, sizes.get("num_heads", teacher.num_heads), teacher)
        if name in sizes and sizes[name] % step:
            below = sizes[name] // step * step
            near = [str(value) for value in (below, below + step) if 0 < value <= getattr(teacher, name)]
            raise UserError(
                f"target {target.text} has {name}={sizes[name]}; expected a multiple of {step}, as block "
                f"quantizers and stock {teacher.family} models need; "
                f"use {' or '.join(near) or 'another number of heads'}"
            )
    return replace(teacher, **sizes)


def _explicit_step(name: str, num_heads: int, teacher: Shape) -> int:
    """What a width must be a multiple of: quantizer blocks where the teacher has them, and whole heads."""
    most = getattr(teacher, name)
    step = BLOCK if most >= STEPS[0] and most % BLOCK == 0 else 1
    if name == "hidden" and family(teacher.family).hidden_divides_by_heads:
        step = lcm(step, num_heads)
    return step


def _fits_inside(target: Target, student: Shape, teacher: Shape) -> Shape:
    """Refuse a published shape that is not a cut of this teacher."""
    fixed = ("vocab", "head_dim", "num_kv_heads", "tied", "qkv_bias", "output_bias", "mlp_bias", "qk_norm")
    if student.family == teacher.family:
        for key, name in SIZES.items():
            if getattr(student, name) > getattr(teacher, name):
                raise UserError(
                    f"the teacher is smaller than target {target.text}: it has {key}="
                    f"{getattr(teacher, name)}, the target {getattr(student, name)}; expected a larger "
                    "teacher; use one, or a smaller target"
                )
    for name in ("family", *fixed):
        if getattr(student, name) != getattr(teacher, name):
            raise UserError(
                f"target {target.text} has {name}={getattr(student, name)} but the teacher has "
                f"{getattr(teacher, name)}; pruning keeps {name}; use a target of the teacher's own line"
            )
    return student


def _bounds(target: Target, teacher: Shape) -> tuple[float, float, float]:
    """The parameters asked for, and the least and most that meet the target. Bytes are of weights, not block scales."""
    if target.kind == "bytes":
        most = target.amount * 8 / BITS[target.precision]
        return most, (1 - TOLERANCE) * most, most
    wanted = target.amount * teacher.parameters if target.kind == "fraction" else target.amount
    return wanted, (1 - TOLERANCE) * wanted, (1 + TOLERANCE) * wanted


def _cut_width(target: Target, teacher: Shape) -> Shape:
    """Keep heads and layers, cut hidden and ffn together until the parameters meet the target."""
    wanted, least, most = _bounds(target, teacher)
    if wanted >= teacher.parameters:
        raise UserError(
            f"the teacher has {teacher.parameters:,} parameters and target {target.text} asks for "
            f"{wanted:,.0f}; the target must be smaller than the teacher; lower the target"
        )
    # Coarse steps must keep the ratio, since a finer one may do better; but multiples of 32 may have any
    # ratio before a width that breaks block quantization is considered.
    any_ratio = float("inf")
    passes = [(step, RATIO_TOLERANCE) for step in STEPS[:-1] if teacher.hidden >= STEPS[0]]
    passes += [(step, any_ratio) for step in (BLOCK, *FINE_STEPS)]
    for step, ratio_tolerance in passes:
        found = [
            (ratio_error + abs(shape.parameters / wanted - 1), shape)
            for shape in _widths(teacher, step=step, least=least, most=most)
            if (ratio_error := _ratio_error(shape, teacher)) <= ratio_tolerance and shape != teacher
        ]
        if found:
            return min(found, key=lambda pair: pair[0])[1]
    smallest = min(shape.parameters for shape in _widths(teacher, step=1, least=0, most=float("inf")))
    raise UserError(
        f"no width of the teacher meets target {target.text} ({least:,.0f} to {most:,.0f} parameters); "
        f"with all heads and layers kept the least is {smallest:,}; set sizes yourself, for instance "
        "layers=.. and hidden=.."
    )


def _ratio_error(shape: Shape, teacher: Shape) -> float:
    return abs(log((shape.ffn / shape.hidden) / (teacher.ffn / teacher.hidden)))


def _widths(teacher: Shape, *, step: int, least: float, most: float) -> Iterator[Shape]:
    """Shapes with hidden and ffn in multiples of `step` and least <= parameters <= most.

    For each hidden there are up to two of them: the ffn just below and just above the one nearest to the
    teacher's ratio among those within the bounds. Parameters are linear in ffn, so the bounds on it need no
    search.
    """
    heads = teacher.num_heads if family(teacher.family).hidden_divides_by_heads else 1
    for hidden in range(step, teacher.hidden + 1, step):
        if hidden % heads:
            continue
        one = replace(teacher, hidden=hidden, ffn=1)
        per_ffn = replace(one, ffn=2).parameters - one.parameters
        fixed = one.parameters - per_ffn
        low = max(step, ceil((least - fixed) / per_ffn / step) * step)
        high = teacher.ffn if most == float("inf") else min(teacher.ffn, floor((most - fixed) / per_ffn))
        high = high // step * step
        if low > high:
            continue
        nearest = hidden * teacher.ffn / teacher.hidden
        below = floor(nearest / step) * step
        for ffn in sorted({min(max(below, low), high), min(max(below + step, low), high)}):
            yield replace(one, ffn=ffn)
