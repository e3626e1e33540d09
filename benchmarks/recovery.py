"""Does each part of the recipe earn its place? One teacher, one target, equal tokens, five ways to the same shape.

    python benchmarks/recovery.py --teacher DIR --data FILE --target 60% --target layers=3 --tokens 1000000

Arms, after figure 6 of arXiv 2408.11796: importance-pruned with logit distillation (what `compressor distill` does),
cut at random (channels, neurons or a block of layers, as the target asks) with the same distillation, the same shape
from random weights with the same distillation and with cross-entropy alone, and importance-pruned with cross-entropy
alone. The table gives held-out cross-entropy in nats per token, per seed.
"""

import argparse
import json
import logging
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from compressor import importance, surgery, teacher
from compressor import recipe as recipes
from compressor.architecture import choose, parse_target
from compressor.checkpoint import Checkpoint, load_model, load_tokenizer
from compressor.data import Blocks, calibration_batches, heldout_batches, records, shuffled, targets
from compressor.distill import distillation_loss
from compressor.scores import Scores
from compressor.shape import Shape
from compressor.signals import Online
from compressor.train import train

ARMS = (
    "importance + KL",
    "random cut + KL",
    "random weights + KL",
    "random weights + cross-entropy",
    "importance + cross-entropy",
)


def scores_of(model: Any, source: Checkpoint, tokenizer: Any, recipe: recipes.Recipe, removed: int) -> Scores:
    """The pipeline's own scores: one pass for the widths, and for the depth what the recipe judges blocks by."""

    def rows(samples: int) -> Any:
        stream = shuffled(records(str(recipe.data.source), fraction=recipe.data.heldout_fraction), seed=recipe.seed)
        return calibration_batches(stream, tokenizer, samples=samples, context=recipe.data.context, batch_size=16)

    sizes = (removed,) if removed and recipe.importance.depth == "block_influence" else ()
    scores = importance.measure(model, rows(recipe.importance.samples), block_sizes=sizes)
    if removed and recipe.importance.depth == "perplexity":
        blocks = importance.candidate_blocks(source.shape.num_layers, removed)
        scores.removal = importance.removal_loss(model, rows(recipe.importance.depth_samples), blocks)
    return scores


def random_cut(teacher: Shape, student: Shape, seed: int) -> surgery.Kept:
    """What is kept when nothing is known: channels and neurons by random scores, and any layers at all."""
    kept = surgery.select(Scores.random(teacher, seed), teacher, student)
    layers = sorted(random.Random(seed).sample(range(teacher.num_layers), student.num_layers))
    if student.ffn != teacher.ffn:
        return kept  # a width target: every layer stays
    return replace(kept, layers=tuple(layers))


def compare(
    source: Checkpoint, *, target: str, data: str, tokens: int, seeds: list[int], arms: list[str], work: Path
) -> dict[str, Any]:
    """Train each of `arms` from every seed and return held-out cross-entropy before and after, and along the way."""
    shape = choose(parse_target(target), source.shape)
    values = {"teacher": str(source.folder), "target": target, "data": {"source": data, "context": 256}}
    values |= {"distill": {"tokens": tokens, "batch": 16, "micro_batch": 16}}
    recipe = recipes.resolve(recipes.build(values), teacher=source.shape, student=shape, max_positions=512)
    tokenizer, model = load_tokenizer(source.folder), teacher.load(source.folder)
    section = {"context": 256, "fraction": recipe.data.heldout_fraction}
    heldout = heldout_batches(data, tokenizer, limit=200, batch_size=16, **section)
    with torch.no_grad():
        loss = distillation_loss(None, settings=recipe.distill)
        sums = [loss(model, batch).parts["ce"].item() for batch in heldout]
    teacher_ce = sum(sums) / sum(int(targets(batch).sum()) for batch in heldout)
    scores = scores_of(model, source, tokenizer, recipe, source.shape.num_layers - shape.num_layers)
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in arms:
        for seed in seeds:
            folder = work / f"{target}-{arm}-{seed}"
            kept = surgery.select(scores, source.shape, shape)
            if arm.startswith("random cut"):
                kept = random_cut(source.shape, shape, seed)
            print(f"{target} {arm} seed {seed}: layers {kept.layers}", file=sys.stderr)
            surgery.prune(source, folder / "start", kept=kept, shape=shape)
            student = load_model(folder / "start", dtype=torch.float32)
            if arm.startswith("random weights"):
                torch.manual_seed(seed)
                student = AutoModelForCausalLM.from_config(student.config).float()
            settings = recipe.distill.model_copy(update={"ce_weight": 0.0 if arm.endswith("KL") else 1.0})
            result = train(
                student,
                loss=distillation_loss(Online(model), settings=settings),
                batches=Blocks(data, tokenizer, seed=seed, **section),
                heldout=heldout,
                settings=settings,
                folder=folder / "checkpoints",
                seed=seed,
            )
            curve = {line["tokens"]: line["heldout_ce"] for line in result.history if "heldout_ce" in line}
            found.setdefault(arm, []).append({"seed": seed, "curve": curve, "seconds": result.seconds})
            print(f"{target} {arm} seed {seed}: {list(curve.values())[-1]:.4f}", file=sys.stderr)
    return {
        "target": target,
        "shape": shape.to_dict(),
        "parameters": shape.parameters,
        "teacher": teacher_ce,
        "arms": found,
    }


def table(result: dict[str, Any]) -> str:
    """A markdown table of one target: before, half-way, and at the end, seeds side by side."""
    share = f"{result['parameters']:,} parameters"
    lines = [f"{result['target']} ({share}); the teacher has {result['teacher']:.3f}", ""]
    lines += ["| arm | before | half-way | end |", "|---|---|---|---|"]
    for arm, seeds in result["arms"].items():
        curves = [list(seed["curve"].values()) for seed in seeds]
        cells = [" / ".join(f"{c[i]:.3f}" for c in curves) for i in (0, len(curves[0]) // 2, -1)]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--target", action="append", required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--arm", action="append", choices=ARMS, help="repeatable; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    source = Checkpoint(arguments.teacher)
    with tempfile.TemporaryDirectory() as work:
        results = [
            compare(
                source,
                target=target,
                data=arguments.data,
                tokens=arguments.tokens,
                seeds=arguments.seeds,
                arms=arguments.arm or list(ARMS),
                work=Path(work),
            )
            for target in arguments.target
        ]
    print(json.dumps(results, indent=2) if arguments.json else "\n\n".join(map(table, results)))


if __name__ == "__main__":
    main()
