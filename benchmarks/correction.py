"""What does correcting the teacher do for the student, where the data are not those the teacher learned from?

    python benchmarks/correction.py [--teacher demo] [--data FILE] [--target 50%] [--tokens 400000] [--seeds 0 1 2]

A student is cut once from the teacher as it is, by scores on the new data. Then, for each mode and seed, the teacher is
corrected on those data and the student distilled from it, with the same tokens in the same order; cross-entropy on
held-out data, in nats per token, is fair to all: of rows that chose no checkpoint. "beside" corrects the teacher while
the student learns, in the student's own tokens. The default data are shifted as far as can be for a teacher of chats:
source text of Python's standard library, which everyone has. `--correct-lr` overrides the recipe's learning rate.
"""

import argparse
import gc
import json
import logging
import statistics
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from compressor import importance, surgery, teacher
from compressor import recipe as recipes
from compressor.architecture import choose, parse_target
from compressor.checkpoint import Checkpoint, load_model, load_tokenizer, resolve
from compressor.data import Blocks, calibration_batches, heldout_batches, num_ids, records, shuffled, targets
from compressor.distill import distill, distillation_loss
from compressor.signals import Online

MODES = ("off", "full", "lora", "norms", "full beside", "lora beside", "norms beside")


def standard_library(folder: Path) -> Path:
    """A JSONL file of the modules of the standard library, packages and tests left out."""
    path = folder / "stdlib.jsonl"
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [module.read_text(encoding="utf-8", errors="replace") for module in modules]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def main() -> None:
    """Print a row for each mode, and the runs behind it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--data", help="default: the standard library's source text")
    parser.add_argument("--target", default="50%")
    parser.add_argument("--tokens", type=int, default=400_000, help="of the student, in every arm")
    parser.add_argument("--correct-tokens", type=int, help="default: the recipe's, a quarter")
    parser.add_argument("--correct-lr", type=float, help="default: the recipe's")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="rows a step, of both trainings")
    parser.add_argument("--eval-every", type=int, default=50, help="steps, of both trainings")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no-student", action="store_true", help="correct only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)

    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        data = options.data or str(standard_library(work))
        source = Checkpoint(resolve(options.teacher))
        shape = choose(parse_target(options.target), source.shape)
        tokenizer = load_tokenizer(source.folder)
        vocab = min(num_ids(tokenizer), shape.vocab)
        section = {"context": options.context, "fraction": 0.05}
        batches = heldout_batches(data, tokenizer, limit=160, batch_size=8, **section)
        heldout, judging = batches[:4], batches[4:]  # checkpoints are chosen by the former

        def rows() -> Any:
            stream = shuffled(records(data, fraction=section["fraction"]), seed=0)
            return calibration_batches(stream, tokenizer, samples=256, context=options.context, batch_size=16)

        removed = source.shape.num_layers - shape.num_layers
        original: Any = teacher.load(source.folder)
        scores = importance.measure(original, rows(), block_sizes=(removed,) if removed else ())
        kept = surgery.select(scores, source.shape, shape)
        surgery.prune(source, work / "pruned", kept=kept, shape=shape)

        def run(name: str, seed: int) -> dict[str, Any]:
            folder, (mode, *beside) = work / f"{name}-{seed}", name.split()
            correct: dict[str, Any] = {"mode": mode, "when": "beside" if beside else "before"}
            if not beside:
                correct |= {"eval_every": options.eval_every}
                correct |= {"tokens": options.correct_tokens} if options.correct_tokens else {}
            correct |= {"lr": options.correct_lr} if options.correct_lr else {}
            values = {"teacher": options.teacher, "target": options.target, "seed": seed}
            values |= {"data": {"source": data, "context": options.context}}
            values |= {"correct": correct}
            sizes = {"batch": options.batch, "micro_batch": options.batch, "eval_every": options.eval_every}
            values |= {"distill": {"tokens": options.tokens} | sizes}
            recipe = recipes.resolve(
                recipes.build(values), teacher=source.shape, student=shape, max_positions=options.context
            )
            batches = Blocks(data, tokenizer, seed=seed, group=options.batch, **section)
            taught_by, found = source.folder, {"mode": name, "seed": seed}
            if mode != "off":
                found |= {"lr": recipe.correct.lr, "trained": trained(source.folder, recipe.correct)}
            if recipe.correct.before:
                training = recipe.correct.training(recipe.distill)
                result = teacher.correct(
                    source.folder,
                    loss=distillation_loss(None, settings=training, vocab=vocab),
                    batches=batches,
                    heldout=heldout,
                    settings=recipe.correct,
                    training=training,
                    folder=folder / "correction",
                    out=folder / "corrected",
                    seed=seed,
                )
                found |= {"steps": result.steps, "seconds": result.seconds}
                if result.best_folder:
                    taught_by = folder / "corrected"
            if beside:
                model = teacher.to_correct(source.folder, settings=recipe.correct, precision="fp32", seed=seed)
            else:
                model = teacher.load(taught_by)
                found["teacher"] = cross_entropy(model)
            if beside or not options.no_student:
                result = distill(
                    work / "pruned",
                    signal=Online(model, learns=bool(beside)),
                    teacher_lr=recipe.correct.lr,
                    batches=batches,
                    heldout=heldout,
                    settings=recipe.distill,
                    folder=folder / "distillation",
                    seed=seed,
                    vocab=vocab,
                )
                assert result.best_folder is not None
                found["student"] = cross_entropy(load_model(result.best_folder, dtype=torch.float32))
                if beside:
                    found |= {"teacher": cross_entropy(model.eval()), "seconds": result.seconds}
            gc.collect()
            print(json.dumps(found), file=sys.stderr, flush=True)
            return found

        def cross_entropy(model: Any) -> float:
            loss = distillation_loss(None, settings=recipes.build({"target": "50%"}).distill, vocab=vocab)
            with torch.no_grad():
                total = sum(loss(model, batch).parts["ce"].item() for batch in judging)
            return total / sum(int(targets(batch).sum()) for batch in judging)

        def trained(folder: Path, settings: Any) -> int:
            model = teacher.MODES[settings.mode](load_model(folder), settings)
            return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

        found = [run(mode, seed) for seed in options.seeds for mode in options.modes]
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))


def table(found: list[dict[str, Any]]) -> str:
    """A markdown row for each mode: means over the seeds, and the student's loss of each seed."""
    lines = ["| mode | trained | seconds | teacher | student, by seed | student | against off |", "|---|" + "---:|" * 6]
    plain = {one["seed"]: one.get("student") for one in found if one["mode"] == "off"}
    for mode in dict.fromkeys(one["mode"] for one in found):
        runs = [one for one in found if one["mode"] == mode]
        students = [one["student"] for one in runs if "student" in one]
        cells = [f"{runs[0].get('trained', 0):,}", f"{statistics.mean(one.get('seconds', 0.0) for one in runs):.0f}"]
        cells += [f"{statistics.mean(one['teacher'] for one in runs):.4f}"]
        cells += [" / ".join(f"{loss:.4f}" for loss in students)]
        cells += [f"{statistics.mean(students):.4f}" if students else "-"]
        pairs = [(one["student"], plain.get(one["seed"])) for one in runs if "student" in one]
        change = [ours / theirs - 1 for ours, theirs in pairs if theirs]
        cells += [f"{statistics.mean(change):+.2%}" if change else "-"]
        lines.append(f"| {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
