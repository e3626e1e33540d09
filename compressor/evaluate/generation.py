"""Judging what a model writes by itself: against references, against itself, and against its teacher's own paths.

Perplexity reads true text; a model in use reads what it wrote, so here it answers held-out prompts several times over,
drawn at temperature 1, as MiniLLM does (arXiv 2306.08543). Lengths and n-grams are counted in tokens. Suffixes: N
picked positions, V vocabulary, L positions of an answer.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from ..data import check_same_tokens, collate, num_ids
from ..data.repetition import GRAM, REPETITION_LIMIT, grams, repetition
from ..errors import UserError
from ..runtime import Runtime
from ..runtime.prompts import Prompt, fitting, ids_of, plain_ids
from . import text

Progress = Callable[[str, int, int | None], None]

SEEDS = (10, 20, 30, 40, 50)  # MiniLLM's, over which it takes the mean
BINS = 15  # of confidence, as Guo et al.
FIRST_LENGTH = 8  # exposure bias is told here and at every doubling
ROUNDING_NATS = 1e-6  # a position's KL divergence below this is float32's rounding, no error to compare with
ROWS = 8  # read together
DRAWS = 100  # held-out records looked at for each prompt wanted

# A student that never learned to stop, or a policy rewarded by length, writes twice as much as it was shown ...
LENGTH_LIMIT = 2.0
# ... and one that found short answers to be safe (MiniLLM without its length normalisation) next to nothing.
SHORTEST = 0.25


def generation(
    runtime: Runtime,
    prompts: Sequence[Prompt],
    *,
    references: Sequence[str | Sequence[str]],
    against: Runtime | None = None,
    seeds: Sequence[int] = SEEDS,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    chunk_tokens: int = 256,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Everything that is measured of a model's own writing, as a JSON-ready dict; docs/report.md names the keys.

    references: one right answer for each prompt, or several. against: the teacher, for exposure bias; it answers the
    same prompts. max_new_tokens: where an answer is cut, and a reference when lengths and confidences are compared.
    chunk_tokens: positions whose logits exist at a time.
    Raises UserError for prompts without references or beyond the context, settings that draw nothing, chats under a
    tokenizer without a chat template, and models that do not share token ids.
    """
    told = [[one] if isinstance(one, str) else list(one) for one in references]
    _check(runtime, prompts, told, seeds=seeds, temperature=temperature, max_new_tokens=max_new_tokens)
    if against is not None:
        check_same_tokens(against.tokenizer, runtime.tokenizer)
    ids = [ids_of(prompt, runtime.tokenizer) for prompt in prompts]
    longest = max(map(len, ids))
    room = runtime.context - max_new_tokens
    if longest > room:
        raise UserError(
            f"a prompt has {longest} tokens; expected at most {room}, the model's context less max_new_tokens; "
            "shorten it, or lower max_new_tokens"
        )
    told_ids = [[plain_ids(one, runtime.tokenizer)[:max_new_tokens] for one in several] for several in told]
    first_ids = [several[0] for several in told_ids]
    models = {"answers": runtime} | ({"the teacher's answers": against} if against is not None else {})
    drawn: dict[str, list[list[list[int]]]] = {name: [] for name in models}  # model -> seed -> prompt -> token ids
    for name, model in models.items():
        for done, seed in enumerate(seeds, start=1):
            drawn[name].append(model.answers(ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed))
            if progress is not None:
                progress(name, done, len(seeds))
    written = {name: _written(answers, seeds, told, told_ids, runtime.tokenizer) for name, answers in drawn.items()}
    ours = written["answers"]
    bias = None
    if against is not None:
        sampled = [[answer for answers in drawn[name] for answer in answers] for name in models]
        options = {"max_new_tokens": max_new_tokens, "chunk": chunk_tokens, "progress": progress}
        repeated = ids * len(seeds)
        errors = [accumulated_error(against, runtime, repeated, answers, **options) for answers in sampled]
        bias = exposure_bias(*errors)
    return {
        "prompts": len(prompts),
        "seeds": list(seeds),
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        **ours,
        **calibration(runtime, ids, first_ids, chunk=chunk_tokens, progress=progress),
        "exposure_bias": bias,
        "teacher": written.get("the teacher's answers"),
        "references": {
            "distinct_4": distinct(first_ids),
            "length": statistics.fmean(map(len, first_ids)),
            "repetition": statistics.fmean(map(repetition, first_ids)),
        },
        "collapsed": collapsed(repetition=ours["repetition"], length_drift=ours["length_drift"]),
    }


def writing(
    runtime: Runtime,
    prompts: Sequence[list[int]],
    references: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int = SEEDS[0],
) -> dict[str, float]:
    """rouge_l, repetition and length_drift of one answer to each prompt (token ids), drawn at temperature 1.

    The same seed draws alike from models that differ little, so that a training's checkpoints compare.
    """
    answers = runtime.answers(prompts, max_new_tokens=max_new_tokens, temperature=1.0, seed=seed)
    told = [[one] for one in references]
    told_ids = [[plain_ids(one, runtime.tokenizer)[:max_new_tokens]] for one in references]
    found = _written([answers], [seed], told, told_ids, runtime.tokenizer)
    return {"rouge_l": found["rouge_l"]["mean"]} | {name: found[name] for name in ("repetition", "length_drift")}


def collapsed(*, repetition: float, length_drift: float) -> str | None:
    """Why a model's writing has run away, in words, or None where it has not.

    repetition and length_drift are `generation`'s. Reverse KL keeps falling while answers turn repetitive or short, so
    training has to look here, not at its loss, to know when to stop.
    """
    if repetition > REPETITION_LIMIT:
        return f"{repetition:.0%} of an answer's {GRAM}-grams repeat earlier ones (limit {REPETITION_LIMIT:.0%})"
    if length_drift > LENGTH_LIMIT:
        return f"answers are {length_drift:.2g} times as long as the references (limit {LENGTH_LIMIT:g})"
    if length_drift < SHORTEST:
        return f"answers are {length_drift:.2g} times as long as the references (limit {SHORTEST:g})"
    return None


def distinct(texts: Iterable[Sequence[Any]]) -> float | None:
    """Dist-4 (Li et al., arXiv 1510.03055): distinct 4-grams over all 4-grams of the texts together; None without."""
    counts = Counter(gram for tokens in texts for gram in grams(tokens))
    return len(counts) / counts.total() if counts else None


def rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean Rouge-L F1, words stemmed; of several references the best one counts. Only a-z and 0-9 make words."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return statistics.fmean(
        scorer.score_multi(several, answer)["rougeL"].fmeasure
        for answer, several in zip(answers, references, strict=True)
    )


def calibration_error(confidence_N: torch.Tensor, correct_N: torch.Tensor, *, bins: int = BINS) -> float:
    """ECE = sum over bins b of n_b / N * |accuracy of b - mean confidence of b| (Guo et al., arXiv 1706.04599, eq. 3).

    confidence_N in [0, 1] and correct_N (bool), (N,) each; bin b of B holds (b - 1) / B < confidence <= b / B.
    """
    bin_N = ((confidence_N.double() * bins).ceil().long() - 1).clamp(0, bins - 1)
    gap_N = correct_N.double() - confidence_N.double()
    return torch.bincount(bin_N, gap_N, minlength=bins).abs().sum().item() / len(gap_N)


def calibration(
    runtime: Runtime,
    prompts: Sequence[list[int]],
    references: Sequence[list[int]],
    *,
    chunk: int = 256,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """How sure the model is of the next token of a reference and how often it is right, reference_tokens of them.

    confidence: mean probability of its first choice; accuracy: share of first choices that are the reference's; ece.
    """
    vocab = num_ids(runtime.tokenizer)
    sure, right = [], []
    counts = [len(ids) for ids in references]
    for rows, batch in _batches(prompts, references, counts, "references", progress):
        targets_N = torch.tensor([token for row in rows for token in references[row]])
        chunks = text.pick(runtime, batch, batch["picked"], chunk=chunk)
        best = [logits_NV[:, :vocab].softmax(-1).max(-1) for logits_NV in chunks]
        sure.append(torch.cat([found.values for found in best]).cpu())
        right.append(torch.cat([found.indices for found in best]).cpu() == targets_N)
    confidence_N, correct_N = torch.cat(sure), torch.cat(right)
    return {
        "ece": calibration_error(confidence_N, correct_N),
        "confidence": confidence_N.double().mean().item(),
        "accuracy": correct_N.double().mean().item(),
        "reference_tokens": len(correct_N),
    }


def accumulated_error(
    teacher: Runtime,
    student: Runtime,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    *,
    max_new_tokens: int,
    chunk: int = 256,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Mean KL(p || q) in nats, summed over the first l positions of the answers, for l = 1 .. max_new_tokens: (L,).

    p is the teacher, q the student, both reading `prompts` and `answers` (token ids). The position at which an answer
    ended counts; after it there is nothing left to disagree about, so an answer adds 0.
    """
    vocab = num_ids(student.tokenizer)
    error_L = torch.zeros(max_new_tokens, dtype=torch.float64)
    counts = [min(len(answer) + 1, max_new_tokens) for answer in answers]
    for rows, batch in _batches(prompts, answers, counts, "exposure bias", progress):
        theirs = text.pick(teacher, batch, batch["picked"], chunk=chunk)
        ours = text.pick(student, batch, batch["picked"], chunk=chunk)
        found = []
        for p_NV, q_NV in zip(theirs, ours, strict=True):
            shared = min(vocab, p_NV.shape[1], q_NV.shape[1])
            log_q_NV = q_NV[:, :shared].log_softmax(-1)
            found.append(text.kl(p_NV[:, :shared].log_softmax(-1).to(log_q_NV.device), log_q_NV))
        for kl_N in torch.cat(found).split([counts[row] for row in rows]):
            error_L[: len(kl_N)] += kl_N
    return error_L.cumsum(0) / len(answers)


def exposure_bias(student_L: torch.Tensor, teacher_L: torch.Tensor) -> list[dict[str, float]]:
    """Excess accumulated error at lengths l = 8, 16, 32, ... and the last: how much reading its own text costs.

    With R(l) the accumulated error on the student's own answers (student_L) and e(l) that on the teacher's (teacher_L),
    ExAccErr(l) = (R(l) - e(l)) / e(l) * 100, in percent: Arora et al., arXiv 2204.01171, as MiniLLM uses it. 0: a
    student errs on its own prefixes as it does on good ones.
    """
    last = len(student_L)
    lengths = [*(FIRST_LENGTH * 2**i for i in range(last) if FIRST_LENGTH * 2**i < last), last]
    rows = []
    for length in lengths:
        ours, theirs = student_L[length - 1].item(), teacher_L[length - 1].item()
        excess = 100 * (ours - theirs) / max(theirs, ROUNDING_NATS * length)
        rows.append({"length": length, "student": ours, "teacher": theirs, "ex_acc_err": excess})
    return rows


def heldout_prompts(
    records: Iterable[dict[str, Any]], tokenizer: Any, *, count: int, context: int, max_new_tokens: int
) -> tuple[list[Prompt], list[str]]:
    """`count` prompts and their references, or as many as there are, from what `data.records` yields.

    See `runtime.prompts.fitting`; turns without text are left out too. Raises UserError where nothing is left, and for
    chats under a tokenizer without a chat template.
    """
    every = fitting(islice(records, DRAWS * count), tokenizer, context=context, max_new_tokens=max_new_tokens)
    found = list(islice((one for one in every if one.reference.strip()), count))
    if not found:
        raise UserError(
            f"no record gives a prompt of at most {context - max_new_tokens} tokens with an answer; expected chats or "
            "texts that leave max_new_tokens free in the context; use other data, or lower max_new_tokens"
        )
    return [one.prompt for one in found], [one.reference for one in found]


def _check(
    runtime: Runtime,
    prompts: Sequence[Prompt],
    told: list[list[str]],
    *,
    seeds: Sequence[int],
    temperature: float,
    max_new_tokens: int,
) -> None:
    """UserError for what cannot be judged."""
    if not prompts or len(prompts) != len(told):
        raise UserError(
            f"{len(prompts)} prompts and {len(told)} references; expected as many references as prompts, at least one; "
            "give each prompt its reference"
        )
    blank = [i for i, several in enumerate(told) if not several or not all(one.strip() for one in several)]
    if blank:
        raise UserError(f"prompt {blank[0] + 1} has an empty reference; expected text; leave the prompt out")
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"the seeds are {list(seeds)}; expected at least one, none twice; name others")
    if temperature <= 0:
        raise UserError(
            f"the temperature is {temperature:g}; expected more than 0, for greedy answers are the same with every "
            "seed; use 1"
        )
    if not 0 < max_new_tokens < runtime.context:
        raise UserError(
            f"max_new_tokens is {max_new_tokens}; expected at least 1 and less than the context of {runtime.context}; "
            "change it"
        )


def _written(
    answers: list[list[list[int]]],
    seeds: Sequence[int],
    told: list[list[str]],
    told_ids: list[list[list[int]]],
    tokenizer: Any,
) -> dict[str, Any]:
    """rouge_l {mean, std, seeds}, distinct_4, length, length_drift and repetition of answers[seed][prompt]."""
    scores = [rouge_l(tokenizer.batch_decode(texts, skip_special_tokens=True), told) for texts in answers]
    distincts = [share for texts in answers if (share := distinct(texts)) is not None]
    every = [tokens for texts in answers for tokens in texts]
    length = statistics.fmean(map(len, every))
    shown = statistics.fmean(statistics.fmean(map(len, several)) for several in told_ids)
    return {
        "rouge_l": {
            "mean": statistics.fmean(scores),
            "std": statistics.stdev(scores) if len(scores) > 1 else None,
            "seeds": {str(seed): score for seed, score in zip(seeds, scores, strict=True)},
        },
        "distinct_4": statistics.fmean(distincts) if distincts else None,
        "length": length,
        "length_drift": length / shown,
        "repetition": statistics.fmean(map(repetition, every)),
    }


def _batches(
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    counts: Sequence[int],
    name: str,
    progress: Progress | None,
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """(numbers of the rows, batch of prompt + answer): "picked" are the counts[row] positions from the prompt's last.

    Rows of like length stand together, so that there is little padding.
    """
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]) + len(answers[row]))
    for start in range(0, len(order), ROWS):
        rows = order[start : start + ROWS]
        batch = []
        for row in rows:
            ids_T = torch.tensor(prompts[row] + answers[row])
            places_T = torch.arange(len(ids_T))
            picked_T = (places_T >= len(prompts[row]) - 1) & (places_T < len(prompts[row]) - 1 + counts[row])
            mask_T = torch.ones_like(ids_T)
            batch.append({"input_ids": ids_T, "position_ids": places_T, "attention_mask": mask_T, "picked": picked_T})
        yield rows, collate(batch)
        if progress is not None:
            progress(name, start + len(rows), len(order))
