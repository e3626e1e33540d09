"""Every way to distill, from one pruned student and for equal tokens: held-out loss, skills, and what it writes.

    python benchmarks/methods.py --teacher demo --data demo --target 50% --tokens 150000 --seeds 0 1 2 --out FOLDER

Each arm is a run of `compressor distill` in FOLDER/ARM-SEED, with the scores of FOLDER/base, so that all start from the
same pruned weights; the seed shuffles and samples. An arm that is finished is not run again, and FOLDER/methods.json
holds what was measured so far. `--arms` takes names of ARMS; `--set` changes every run's recipe. On-policy arms spend
part of the tokens on their start. Columns: held-out cross-entropy (nats per token), forward KL to the teacher, mean of
the four skills and each of them, Rouge-L (5 samples of each prompt at temperature 1), distinct-4, length over the
reference's, repetition, ECE, excess accumulated error at the last length (%), tokens and seconds of training.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from compressor import pipeline
from compressor.errors import CheckFailed
from compressor.recipe import ON_POLICY, set_value
from compressor.run import read_json, write_json

PROMPTS = {"distill.prompts": 2000}  # that the teacher or the student answers
MINILLM = PROMPTS | {"distill.method": "minillm"}
GKD = PROMPTS | {"distill.method": "gkd"}
ARMS: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "reverse_kl": {"distill.divergence": "reverse_kl"},
    "skew_forward_kl": {"distill.divergence": "skew_forward_kl"},
    "skew_reverse_kl": {"distill.divergence": "skew_reverse_kl"},
    "jsd": {"distill.divergence": "jsd"},
    "total_variation": {"distill.divergence": "total_variation"},
    "no hidden states": {"distill.hidden_loss": "off"},
    "hidden states": {"distill.hidden_loss": "cosine"},
    "sft": {"distill.method": "sft"},
    "seqkd": PROMPTS | {"distill.method": "seqkd"},
    "gkd": GKD,
    "minillm": MINILLM,
    "gkd from kl": GKD | {"onpolicy.start": "kl"},
    "minillm from kl": MINILLM | {"onpolicy.start": "kl"},
    "minillm, reference": MINILLM | {"onpolicy.variant": "reference"},
    "minillm without its start": MINILLM | {"onpolicy.start": "none"},
    "minillm without the teacher's share": MINILLM | {"onpolicy.teacher_share": 0.0},
    "minillm without length_norm": MINILLM | {"onpolicy.length_norm": False},
    "minillm without single_step": MINILLM | {"onpolicy.single_step": False},
    "minillm without its anchor": MINILLM | {"onpolicy.anchor": 0.0},
}
COLUMNS = ("loss", "kl", "skills", "instruction", "roleplay", "rag", "tools", "rouge_l", "distinct_4")
COLUMNS += ("length_drift", "repetition", "ece", "ex_acc_err", "tokens", "seconds")


def recipe_of(options: argparse.Namespace, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a run; its own evaluation is kept short, as the student is judged afterwards."""
    values: dict[str, Any] = {"teacher": options.teacher, "target": options.target, "seed": seed}
    values |= {"data": {"source": options.data}, "distill": {"tokens": options.tokens}, "export": {"formats": []}}
    values["evaluate"] = {"prompts": 1, "tokens": 2000}
    for assignment in [*options.set, *(f"{key}={json.dumps(value)}" for key, value in changes.items())]:
        set_value(values, assignment)
    return values


def measured(options: argparse.Namespace, arm: str, seed: int, scores: Path) -> dict[str, float]:
    """Train one arm, or read what it left, and judge its student."""
    folder = options.out / f"{arm.replace(' ', '-').replace(',', '')}-{seed}"
    changes = {"importance.scores": str(scores)} | ARMS[arm]
    if ARMS[arm].get("distill.method") in ON_POLICY:
        changes["evaluate.prompts"] = options.prompts  # the checkpoint is chosen by others than these
    try:
        pipeline.distill(recipe_of(options, seed, changes), out=folder, say=print)
    except CheckFailed as failed:  # a student that came out worse is a result too
        print(failed)
    if not (folder / "judged.json").exists():
        judged = pipeline.evaluate(str(folder), prompts=options.prompts, tokens=20_000, generation=True)
        write_json(folder / "judged.json", judged["result"])
    found, stages = read_json(folder / "judged.json"), read_json(folder / "run.json")["stages"]
    writing, skills = found["generation"], {name: score["score"] for name, score in found["skills"].items()}
    spent = [stages[name] for name in ("answers", "start", "distill") if name in stages]
    return {
        "loss": math.log(found["perplexity"]),
        "kl": found["agreement"]["kl"],
        **({"skills": statistics.fmean(skills.values())} if skills else {}),
        **skills,
        "rouge_l": writing["rouge_l"]["mean"],
        **{name: writing[name] for name in ("distinct_4", "length_drift", "repetition", "ece")},
        "ex_acc_err": writing["exposure_bias"][-1]["ex_acc_err"],
        "tokens": sum(stage.get("tokens", 0) for stage in spent),
        "seconds": sum(stage["seconds"] for stage in spent),
    }


def main() -> None:
    """Run what is missing, arm by arm within a seed, and print the table: mean (standard deviation) over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--target", default="50%")
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=50, help="tasks per skill, and prompts to write on")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", default=list(ARMS))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    scores = options.out / "base" / "scores.safetensors"
    if not scores.exists():
        short = {"distill.tokens": 20_000, "distill.warmup_steps": 0, "distill.method": "sft"}
        try:
            pipeline.distill(recipe_of(options, 0, short), out=options.out / "base", say=print)
        except CheckFailed as failed:
            print(failed)
    table: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        for arm in options.arms:
            table.setdefault(arm, []).append(measured(options, arm, seed, scores))
            print(seed, arm, json.dumps(table[arm][-1]), flush=True)
    write_json(options.out / "methods.json", table)
    shown = [name for name in COLUMNS if all(name in row for rows in table.values() for row in rows)]
    print("| method | " + " | ".join(shown) + " |")
    print("|---" * (len(shown) + 1) + "|")
    for arm, rows in table.items():
        cells = []
        for name in shown:
            values = [row[name] for row in rows]
            spread = f" ({statistics.stdev(values):.3g})" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.4g}{spread}")
        print(f"| {arm} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
