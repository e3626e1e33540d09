"""Latency and memory of artifacts, each in a fresh process; budgets checked, other devices estimated.

    bench(["runs/demo/export/onnx-int4"], budgets=[parse_budget("memory=1GiB")], on="raspberry-pi-5-8gb")

A point is a prompt length: the time to its first token is TTFT, and the tokens after it are decoded at that depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import Any

from compressor.child import Child
from compressor.errors import UserError

from .artifact import read_manifest
from .devices import Budget, Device, Workload, device, parse_bytes, shape_for_estimates
from .machine import cores, machine

POINTS = (16, 128, 512, 2048)
HEADLINE = 128  # the prompt length whose figures are held to budgets, or the longest one below it
NEW_TOKENS = 32
REPEATS = 5
WORST_INT4_BITS = 6.5  # bits a weight of an int4 artifact of a small model, whose head is a large part of it
Say = Callable[[str], None]


def bench(
    whats: Sequence[str],
    *,
    on: str | None = None,
    budgets: Sequence[Budget] = (),
    versus: bool = False,
    fit: bool = False,
    threads: int | None = None,
    repeats: int = REPEATS,
    points: Sequence[int] = POINTS,
    say: Say = lambda message: None,
) -> dict[str, Any]:
    """Measure artifacts and return {"machine", "host", "device", "artifacts", "ratios", "fit"}; see docs/bench.md.

    on: a device profile; its memory and disk become budgets, its latency is estimated (`host`: measured). versus: all
    artifacts are kept open and measured in turn, and compared pair by pair. fit: name the best of them that meets every
    budget.
    Raises UserError for what cannot be opened.
    """
    threads = threads or cores()
    host = device("host", threads=threads)
    target = host if on == "host" else device(on) if on else None
    if target is not None:
        if target is not host and any(budget.key == "load" for budget in budgets):
            raise UserError(f"load time on {on} cannot be estimated; expected other budgets; leave load= out")
        own = {budget.key for budget in budgets}
        defaults = (Budget("memory", target.free), Budget("disk", target.disk))
        budgets = [*budgets, *(budget for budget in defaults if budget.key not in own)]
    measured = (
        _together(whats, threads, repeats, points, say)
        if versus
        else [_alone(what, threads, repeats, points, say) for what in whats]
    )
    artifacts = [_figures(found, host=host, target=target, budgets=budgets) for found in measured]
    return {
        "machine": machine() | {"threads": threads},
        "method": {"repeats": repeats, "new_tokens": NEW_TOKENS, "warm_up": 1, "headline_prompt": HEADLINE},
        "host": host.to_dict(),
        "device": target.to_dict() if target else None,
        "artifacts": artifacts,
        "ratios": _ratios(measured) if versus else [],
        "fit": best_fit(artifacts, budgets) if fit else None,
    }


def _alone(what: str, threads: int, repeats: int, points: Sequence[int], say: Say) -> dict[str, Any]:
    say(f"measuring {what}")
    with Child("export.bench_child", what) as child:
        loaded = child.ask("load", what=what, threads=threads)
        lengths = _lengths(loaded["context"], points)
        for length in lengths:
            child.ask("run", prompt=length, new=4)
        runs = {length: [child.ask("run", prompt=length, new=NEW_TOKENS) for _ in range(repeats)] for length in lengths}
        return {"what": what, "loaded": loaded, "runs": runs, "memory": child.ask("memory")}


def _together(
    whats: Sequence[str], threads: int, repeats: int, points: Sequence[int], say: Say
) -> list[dict[str, Any]]:
    """As `_alone`, but the runs alternate between artifacts, so that a busy moment of the machine meets them all."""
    say(f"measuring {', '.join(whats)} in turn")
    with ExitStack() as stack:
        children = [stack.enter_context(Child("export.bench_child", what)) for what in whats]
        loaded = [child.ask("load", what=child.name, threads=threads) for child in children]
        lengths = _lengths(min(found["context"] for found in loaded), points)
        runs: list[dict[int, list[dict[str, Any]]]] = [{length: [] for length in lengths} for _ in children]
        for length in lengths:
            for child in children:
                child.ask("run", prompt=length, new=4)
            for _ in range(repeats):
                for child, found in zip(children, runs, strict=True):
                    found[length].append(child.ask("run", prompt=length, new=NEW_TOKENS))
        return [
            {"what": child.name, "loaded": one, "runs": found, "memory": child.ask("memory")}
            for child, one, found in zip(children, loaded, runs, strict=True)
        ]


def _lengths(context: int, points: Sequence[int]) -> list[int]:
    """The points that fit a context with the tokens decoded after them; at least one."""
    most = context - NEW_TOKENS - 1
    return [length for length in points if length <= most] or [max(1, most)]


def _figures(
    found: dict[str, Any], *, host: Device, target: Device | None, budgets: Sequence[Budget]
) -> dict[str, Any]:
    """One artifact's figures from its raw runs."""
    import numpy

    what, loaded, memory = found["what"], found["loaded"], found["memory"]
    folder = Path(what)
    manifest = read_manifest(folder) if folder.is_dir() else None
    shape = shape_for_estimates(what)
    work = Workload(shape, loaded["memory_bytes"], loaded["kv_bytes_per_value"], loaded["every_logit"])
    points = []
    for length, runs in found["runs"].items():
        first = numpy.array([run["ttft_s"] for run in runs])
        rates = numpy.array([(run["tokens"] - 1) / run["decode_s"] for run in runs])
        points.append(
            {
                "prompt": length,
                "ttft_p50_s": float(numpy.median(first)),
                "ttft_p95_s": float(numpy.quantile(first, 0.95)),
                "prefill_tokens_per_s": length / float(numpy.median(first)),
                "decode_tokens_per_s": float(numpy.median(rates)),
                "decode_low": float(rates.min()),
                "decode_high": float(rates.max()),
            }
        )
    headline = max((p for p in points if p["prompt"] <= HEADLINE), key=lambda p: p["prompt"], default=points[0])
    longest = points[-1]["prompt"]
    baseline = loaded["baseline_rss_bytes"] or 0
    sizes = {"prompt": longest, "baseline": baseline}
    result: dict[str, Any] = {
        "what": what,
        "format": manifest["format"] if manifest else "torch",
        "precision": manifest["precision"] if manifest else None,
        "runtime": loaded["runtime"],
        "versions": loaded["versions"],
        "bytes": loaded["bytes"],
        "bits_per_weight": 8 * loaded["bytes"] / loaded["parameters"],
        "kv_bytes_per_token": work.kv_bytes_per_token,
        "load_s": loaded["load_s"],
        "headline": headline,
        "points": points,
        "memory": memory
        | {
            "above_baseline_bytes": memory["peak_rss_bytes"] - baseline if memory["peak_rss_bytes"] else None,
            "predicted": work.memory(context=longest + NEW_TOKENS, **sizes),
            "predicted_at_context": work.memory(context=loaded["context"], **sizes) | {"context": loaded["context"]},
        },
        "quality": _quality(manifest),
        "estimate": _estimate(work, headline, host=host, target=target),
    }
    # a GGUF file is llama.cpp's: where transformers ran it in float32, only its size is its own
    result["stand_in"] = result["format"] == "gguf" and result["runtime"] != "llama.cpp"
    result["budget"] = [_verdict(budget, result, target=target) for budget in budgets]
    result["passed"] = all(line["passed"] for line in result["budget"])
    return result


def _quality(manifest: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the manifest says of how near the artifact is to its student."""
    if not manifest or not manifest.get("agreement") or not manifest["agreement"]["student"]:
        return None
    near = manifest["agreement"]["student"]
    teacher = manifest["agreement"]["teacher"] or {}
    return {"kl_student": near["kl"], "kl_teacher": teacher.get("kl"), "student": manifest["student"]}


def _estimate(work: Workload, headline: dict[str, Any], *, host: Device, target: Device | None) -> dict[str, Any]:
    """Rooflines of the headline point: on this machine against what was measured, and on the device.

    `expected` takes the device to miss its roofline by as much as this machine missed its own.
    """
    prompt = headline["prompt"]
    measured = {"ttft_s": headline["ttft_p50_s"], "decode_s": 1 / headline["decode_tokens_per_s"]}

    def roofline(device: Device) -> dict[str, float]:
        return {"ttft_s": work.prefill_seconds(device, prompt), "decode_s": work.decode_seconds(device, prompt)}

    here = roofline(host)
    missed = {key: measured[key] / here[key] for key in here}
    result: dict[str, Any] = {"host": {"roofline": here, "measured": measured, "measured_over_roofline": missed}}
    if target is not None:
        there = roofline(target)
        result["device"] = {
            "name": target.name,
            "roofline": there,
            "expected": {key: there[key] * max(1.0, missed[key]) for key in there},
        }
    return result


def _verdict(budget: Budget, result: dict[str, Any], *, target: Device | None) -> dict[str, Any]:
    """What was measured against its limit; what another device or another runtime would give is marked an estimate."""
    headline = result["headline"]
    measured: dict[str, float | None] = {
        "memory": result["memory"]["peak_rss_bytes"],
        "disk": result["bytes"],
        "load": result["load_s"],
        "ttft": headline["ttft_p50_s"],
        "decode": headline["decode_tokens_per_s"],
        "prefill": headline["prefill_tokens_per_s"],
    }
    estimated: dict[str, float] = {}
    if target is not None and target.name != "host":
        expected = result["estimate"]["device"]["expected"]
        estimated = {"ttft": expected["ttft_s"], "decode": 1 / expected["decode_s"]}
        estimated["prefill"] = headline["prompt"] / expected["ttft_s"]
    predicted = result["memory"]["predicted_at_context"]
    if target is not None and target.unit == "gpu":  # its memory holds the model, not this process
        estimated["memory"] = predicted["total"] - predicted["runtime"]
    elif result["stand_in"]:
        estimated["memory"] = predicted["total"] - predicted["weights"] + result["bytes"]
    if budget.key in estimated:
        return budget.check(estimated[budget.key], estimate=True)
    return budget.check(measured[budget.key])


def _ratios(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each two artifacts and each point: how many times as fast the first is, run beside run."""
    import numpy

    found = []
    for one, two in combinations(measured, 2):
        for length, runs in one["runs"].items():
            others = two["runs"][length]
            for key, words in (("decode_s", "decode"), ("ttft_s", "ttft")):
                ratios = numpy.array([other[key] / run[key] for run, other in zip(runs, others, strict=True)])
                found.append(
                    {
                        "first": one["what"],
                        "second": two["what"],
                        "prompt": length,
                        "measure": words,
                        "speed_up": float(numpy.median(ratios)),
                        "low": float(ratios.min()),
                        "high": float(ratios.max()),
                    }
                )
    return found


def best_fit(artifacts: list[dict[str, Any]], budgets: Sequence[Budget]) -> dict[str, Any]:
    """The best artifact that meets every budget, or the target size that would.

    Best: the least KL divergence from the teacher, else from a student that all share, else the most bits per weight.
    """
    fitting = [found for found in artifacts if found["passed"]]
    if fitting:
        qualities = [found["quality"] or {} for found in fitting]
        if all(quality.get("kl_teacher") is not None for quality in qualities):
            key, by = "kl_teacher", "KL divergence from the teacher"
        elif all(quality for quality in qualities) and len({quality["student"] for quality in qualities}) == 1:
            key, by = "kl_student", "KL divergence from the student"
        else:
            return {"what": max(fitting, key=lambda found: found["bits_per_weight"])["what"], "by": "bits per weight"}
        return {"what": min(fitting, key=lambda found: found["quality"][key])["what"], "by": by}
    limits = {budget.key: budget.limit for budget in budgets if budget.key in ("memory", "disk")}
    smallest = min(artifacts, key=lambda found: found["bytes"])
    slow = [line["what"] for line in smallest.get("budget", []) if not line["passed"] and line["budget"] not in limits]
    if slow:  # how much smaller a model must be to be that fast is not known from its size
        return {"what": None, "target": None, "why": f"even the smallest misses its {slow[0]}"}
    overhead = (smallest["memory"]["peak_rss_bytes"] or 0) - smallest["bytes"]
    rooms = [limits["disk"]] if "disk" in limits else []
    rooms += [limits["memory"] - overhead] if "memory" in limits else []
    # a target counts 4 bits a weight, an artifact has scales and wider parts beside them
    room = min(rooms, default=0) * 4 / max(4.0, min(smallest["bits_per_weight"], WORST_INT4_BITS))
    if room <= parse_bytes("1MiB"):
        tight = "memory" in limits and limits["memory"] - overhead <= parse_bytes("1MiB")
        why = "the libraries alone take that much" if tight else "less than 1 MiB is left for the weights"
        return {"what": None, "target": None, "why": why}
    target = f"{room / 2**20:.0f}MiB@int4"
    return {"what": None, "target": target, "why": f"a student of --target {target} would"}
