"""What a cache costs and saves: bytes a token, the loss it gives beside the online one, the time of a training step.

    python benchmarks/signals.py RUN [--student pruned] [--temperature 1]
                                 [--batches 24] [--rows 4] [--repeats 5]

RUN is a finished run folder: its teacher is asked, its student or its pruned model learns. Steps with each signal
alternate, forward, backward and nothing else, so that a busy moment of the machine meets them all; each is told as a
ratio to the online step beside it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from compressor import recipe as recipes
from compressor import teacher as teachers
from compressor.checkpoint import Checkpoint, load_model, load_tokenizer, resolve
from compressor.data import Batch, Blocks, collate, num_ids, targets
from compressor.distill import distillation_loss
from compressor.losses import TopK
from compressor.plan import hub_name
from compressor.run import Run
from compressor.signals import Cached, Kind, Online, Signal, build, fingerprint


class Bucket:
    """A cache of the top k without the ids drawn from their tail."""

    def __init__(self, cached: Cached) -> None:
        self.cached = cached

    def __call__(self, batch: Batch, counted_BT: torch.Tensor) -> TopK:
        """As `Cached`."""
        found = self.cached(batch, counted_BT)
        assert isinstance(found, TopK)
        return found._replace(drawn_NM=None)


def main() -> None:
    """Print a row for each signal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--student", choices=("student", "pruned"), default="student")
    parser.add_argument("--temperature", type=float, help="of the loss and of what is kept; the run's unless given")
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    run = Run(options.run)
    recipe = recipes.build(recipes.load_values(str(run.recipe)))
    settings = recipe.distill
    if options.temperature:
        settings = settings.model_copy(update={"temperature": options.temperature})
    folder = resolve(hub_name(recipe.teacher))
    tokenizer = load_tokenizer(folder)
    teacher = teachers.load(folder)
    student = load_model(getattr(run, options.student), dtype=torch.float32)
    blocks = Blocks(str(recipe.data.source), tokenizer, context=recipe.data.context, group=options.rows)
    rows = list(islice(blocks, options.batches * options.rows))
    batches = [collate(rows[i : i + options.rows]) for i in range(0, len(rows), options.rows)]
    count = sum(int(targets(batch).sum()) for batch in batches)
    vocab = min(num_ids(tokenizer), student.config.vocab_size)
    signals: dict[str, Signal] = {"online": Online(teacher)}
    nbytes = {"online": 0.0}
    with tempfile.TemporaryDirectory() as place:
        kinds: list[tuple[Kind, int]] = [("hidden", 1), ("topk", 64), ("topk", 16), ("sampled", 64), ("sampled", 12)]
        for kind, keep in kinds:
            name = kind if kind == "hidden" else f"{kind} {keep}"
            about = fingerprint(
                teacher=Checkpoint(folder).fingerprint(),
                tokenizer=tokenizer,
                kind=kind,
                keep=keep,
                temperature=settings.temperature,
                vocab=vocab,
                rows={},
            )
            build(Path(place) / name, lambda: teacher, rows, about=about, batch_size=options.rows)
            signals[name] = cached = Cached(Path(place) / name, about)
            nbytes[name] = cached.bytes_per_token
            if kind == "topk":
                signals[f"{name}, no draws"] = Bucket(cached)
                nbytes[f"{name}, no draws"] = cached.bytes_per_token

        def loss(name: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return distillation_loss(signals[name], settings=settings, vocab=vocab)(student, batch).loss

        with torch.no_grad():
            losses = {name: sum(float(loss(name, batch)) for batch in batches) / count for name in signals}
        seconds: dict[str, list[float]] = {name: [] for name in signals}
        for _ in range(options.repeats):
            for batch in batches[:8]:
                for name in signals:
                    started = time.perf_counter()
                    loss(name, batch).backward()
                    seconds[name].append(time.perf_counter() - started)
                    student.zero_grad(set_to_none=True)
        print(f"temperature {settings.temperature:g}, {options.student}")
        print(f"{count} tokens, {len(batches)} batches of {options.rows} rows, vocabulary {vocab}")
        print(f"{'signal':<18}{'bytes/token':>12}{'loss':>10}{'gap':>9}{'step, of online':>18}")
        for name, found in losses.items():
            ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["online"], strict=True))
            gap = found / losses["online"] - 1
            print(f"{name:<18}{nbytes[name]:>12.0f}{found:>10.5f}{gap:>+9.2%}{ratio:>18.2f}")


if __name__ == "__main__":
    main()
