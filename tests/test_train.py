"""The training loop on tiny models: exact normalisation, packing, schedule, checkpoints, two processes."""

import json
import math
import multiprocessing
import os
import socket
from types import SimpleNamespace

import pytest
import torch
from models import tiny_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from compressor import train as training
from compressor.data import collate, hidden_states, position_ids, targets
from compressor.errors import UserError
from compressor.recipe import Distill
from compressor.train import LossSum, train

CONTEXT = 12


class Rows(torch.utils.data.IterableDataset):
    """Endless rows of unequal length and target count: a ramp of ids, packed from two documents or padded."""

    def __init__(self, *, seed=0, poison=None):
        self.seed, self.poison = seed, poison

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        for count in range(10**9):
            first = int(torch.randint(3, 200, (1,), generator=generator))
            length = int(torch.randint(4, CONTEXT + 1, (1,), generator=generator))
            ids = first + torch.arange(length)
            positions = torch.cat([torch.arange(3), torch.arange(length - 3)])
            labels = ids.clone()
            labels[: int(torch.randint(1, length - 1, (1,), generator=generator))] = -100
            if count == self.poison:
                ids = ids * 0  # the row that `poisoned_loss` answers with NaN
            yield {
                "input_ids": ids,
                "labels": labels,
                "attention_mask": torch.ones(length, dtype=torch.long),
                "position_ids": positions,
            }


def first_rows(count, **options):
    rows = iter(Rows(**options))
    return [next(rows) for _ in range(count)]


def settings(**changes):
    values = {
        "tokens": 8 * 8 * 8,  # about 8 steps of 8 rows of 8 tokens
        "batch": 8,
        "micro_batch": 8,
        "lr": 3e-3,
        "min_lr": 3e-4,
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "temperature": 1.0,
        "ce_weight": 0.0,
        "precision": "auto",
        "gradient_checkpointing": False,
        "eval_every": 4,
        "save_every": 2,
        "chunk_tokens": 16,
    }
    return Distill(**(values | changes))


def cross_entropy(model, batch):
    """A loss function with whole logits, summed over targets."""
    counted = targets(batch)
    logits = hidden_states(model, batch)[:, :-1][counted] @ model.lm_head.weight.t()
    loss = functional.cross_entropy(logits, batch["labels"][:, 1:][counted], reduction="sum")
    return LossSum(loss, {"ce": loss.detach()})


def poisoned_loss(model, batch):
    loss, parts = cross_entropy(model, batch)
    return LossSum(loss * (math.nan if bool((batch["input_ids"] == 0).all(-1).any()) else 1.0), parts)


def run(folder, *, model=None, loss=cross_entropy, rows=None, **changes):
    model = model or tiny_model()
    heldout = [collate(first_rows(3, seed=9)), collate(first_rows(2, seed=8))]
    result = train(
        model,
        loss=loss,
        batches=rows or Rows(),
        heldout=heldout,
        settings=settings(**changes),
        folder=folder,
        seed=1,
    )
    return result, model.state_dict()


def values(history, name):
    return torch.tensor([line[name] for line in history if name in line])


def lines(folder, *, but=("seconds", "tokens_per_second")):
    parsed = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in but} for line in parsed]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One complete run that several tests read: (result, final weights, folder)."""
    folder = tmp_path_factory.mktemp("whole")
    return *run(folder), folder


def test_loss_and_gradients_do_not_depend_on_the_micro_batch(whole, tmp_path):
    result, weights, _ = whole
    split, split_weights = run(tmp_path, micro_batch=2)
    for name in ("loss", "grad_norm", "heldout_loss"):
        torch.testing.assert_close(values(split.history, name), values(result.history, name), rtol=2e-4, atol=0)
    for name, weight in weights.items():
        torch.testing.assert_close(split_weights[name], weight, rtol=0, atol=2e-4, msg=name)


def test_first_step_is_the_mean_over_its_targets(tmp_path):
    """Loss and gradient norm of a step split in four equal those computed by hand over all rows at once."""
    result, _ = run(tmp_path, micro_batch=2, tokens=100, warmup_steps=0, max_grad_norm=1e9)
    assert result.steps == 1
    model, batch = tiny_model(), collate(first_rows(8))
    loss = cross_entropy(model, batch).loss / targets(batch).sum()
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert values(result.history, "loss").item() == pytest.approx(loss.item(), rel=1e-5)
    assert values(result.history, "ce").item() == pytest.approx(loss.item(), rel=1e-5)
    assert values(result.history, "grad_norm").item() == pytest.approx(norm.item(), rel=1e-4)


def test_parts_of_the_loss_are_means_since_the_last_log_over_the_rows_that_have_them(tmp_path):
    seen = []

    def loss(model, batch):
        found, count = cross_entropy(model, batch).loss, targets(batch).sum()
        if not torch.is_grad_enabled():
            return LossSum(found, {})
        seen.append(True)
        step, first = divmod(len(seen) - 1, 2)
        return LossSum(found, {"ce": count * step} | ({"clipped": count * 0.25} if first else {}))

    result, _ = run(tmp_path, loss=loss, micro_batch=4)
    logged = [line for line in result.history if "lr" in line]
    assert {line["clipped"] for line in logged} == {0.25}
    for earlier, line in zip([{"step": 0}, *logged], logged, strict=False):
        assert earlier["step"] <= line["ce"] <= line["step"] - 1, line  # steps are numbered from 0 here
        assert (earlier["step"] < line["ce"]) == (line["step"] - earlier["step"] > 1), line


def test_the_checkpoint_and_the_verdict_go_by_the_figure_that_is_asked_for(tmp_path):
    """A loss that rises where the cross-entropy falls, as a divergence to a teacher that moves may."""
    calls = []

    def loss(model, batch):
        found = cross_entropy(model, batch)
        calls.extend([] if torch.is_grad_enabled() else [True])
        return LossSum(found.loss if torch.is_grad_enabled() else found.loss + 1e4 * len(calls), found.parts)

    common = {"loss": loss, "batches": Rows(), "heldout": [collate(first_rows(3, seed=9))], "settings": settings()}
    by_loss = train(tiny_model(), folder=tmp_path / "loss", **common)
    by_ce = train(tiny_model(), folder=tmp_path / "ce", best="ce", **common)
    assert (by_loss.status, by_loss.best_folder) == ("worse", None)
    assert by_ce.status == "ok"
    assert by_ce.best_folder == tmp_path / "ce" / f"checkpoint-{by_ce.steps}"
    found = values(by_ce.history, "heldout_ce")[[0, -1]].tolist()
    assert [by_ce.first_heldout, by_ce.last_heldout] == pytest.approx(found)
    assert "held-out cross-entropy" in by_ce.describe()


def test_heldout_loss_is_exact_over_unequal_batches(whole):
    model, batches = tiny_model(), [collate(first_rows(3, seed=9)), collate(first_rows(2, seed=8))]
    with torch.no_grad():
        total = sum(float(cross_entropy(model, batch).loss) for batch in batches)
    expected = total / sum(int(targets(batch).sum()) for batch in batches)
    assert whole[0].first_heldout == pytest.approx(expected, rel=1e-6)
    assert whole[0].history[0]["step"] == 0


def test_it_learns_counts_tokens_and_follows_the_schedule(whole):
    result, _, folder = whole
    assert result.status == "ok"
    assert result.last_heldout < result.first_heldout
    steps = result.steps
    expected = sum(len(row["input_ids"]) for row in first_rows(8 * steps))
    assert result.tokens == expected
    assert abs(expected - 512) <= 8 * CONTEXT
    logged = {line["step"]: line["lr"] for line in result.history if "lr" in line}

    def lr(step):
        share = (step - 2) / (steps - 2)
        return 3e-4 + (3e-3 - 3e-4) * 0.5 * (1 + math.cos(math.pi * share))

    assert set(logged) == {1, *range(2, steps + 1, 2), steps}
    # The rate in use during step n was set after step n - 1.
    assert {step: pytest.approx(lr(step - 1), rel=1e-6) for step in logged if step > 2} == {
        step: value for step, value in logged.items() if step > 2
    }
    assert lines(folder)[-1].keys() == {"step", "tokens", "heldout_loss", "heldout_ce"}
    assert any((folder / "tensorboard").glob("events.*"))


def test_checkpoint_is_a_stock_folder_with_the_trained_weights(whole):
    result, weights, folder = whole
    last = training.last_checkpoint(folder)
    assert last.name == f"checkpoint-{result.steps}"
    model, report = AutoModelForCausalLM.from_pretrained(last, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_a_finished_run_is_read_not_trained_again(whole):
    result, _, folder = whole
    before = {path: path.stat().st_mtime_ns for path in folder.glob("checkpoint-*/*")}
    again, _ = run(folder)
    assert again == result
    assert {path: path.stat().st_mtime_ns for path in folder.glob("checkpoint-*/*")} == before


def test_best_and_last_checkpoints_are_kept(tmp_path):
    """Two steps down, then up: the end is worse than the start, and the best of the middle is still there."""
    trained = []

    def turning(model, batch):
        loss, parts = cross_entropy(model, batch)
        trained.append(model.training)
        return LossSum(-loss if model.training and sum(trained) > 2 else loss, parts)

    changes = {"tokens": 1200, "eval_every": 1, "save_every": 1, "warmup_steps": 0, "min_lr": 3e-3}
    result, _ = run(tmp_path, loss=turning, **changes)
    heldout = values(result.history, "heldout_loss")
    best = int(heldout.argmin())
    assert 0 < best < result.steps
    assert result.status == "worse"
    assert result.last_heldout == pytest.approx(heldout[-1].item())
    assert heldout[-1] > heldout[0]
    assert result.best_heldout == pytest.approx(heldout.min().item())
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in (best, result.steps)
    }
    assert result.best_folder == tmp_path / f"checkpoint-{best}"


def test_a_loss_that_is_not_finite_stops_training(tmp_path):
    result, weights = run(tmp_path, loss=poisoned_loss, rows=Rows(poison=8 * 5 + 3), save_every=50)
    assert result.status == "not_finite"
    assert result.steps == 5
    assert result.best_folder == tmp_path / "checkpoint-4"
    assert (result.best_folder / "model.safetensors").is_file()
    assert all(bool(weight.isfinite().all()) for weight in weights.values())
    assert result.best_heldout < result.first_heldout


def test_not_finite_from_the_start(tmp_path):
    result, _ = run(tmp_path, loss=lambda model, batch: LossSum(cross_entropy(model, batch).loss * math.nan, {}))
    assert result.status == "not_finite"
    assert result.steps == 0
    assert result.best_folder is None
    assert lines(tmp_path) == [{"step": 0, "tokens": 0, "heldout_loss": None}]  # JSON knows no NaN


def test_gradient_checkpointing_and_bf16(whole, tmp_path):
    """Recomputed activations change nothing; bf16 autocast changes little, and weights stay float32."""
    result, _, _ = whole
    model, forwards = tiny_model(), []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    recomputed, _ = run(tmp_path / "recomputed", model=model, gradient_checkpointing=True)
    assert sum(forwards) == 2 * recomputed.steps  # once more in the backward pass
    torch.testing.assert_close(values(recomputed.history, "loss"), values(result.history, "loss"))
    half, weights = run(tmp_path / "half", precision="bf16")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    losses = values(half.history, "loss"), values(result.history, "loss")
    torch.testing.assert_close(*losses, rtol=2e-2, atol=0)
    assert not torch.equal(*losses)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_packed_documents_do_not_see_each_other(model_type):
    model = tiny_model(model_type)
    ids = torch.randint(3, 259, (11,), generator=torch.Generator().manual_seed(0))
    packed = {"input_ids": ids[None], "position_ids": torch.tensor([[*range(4), *range(7)]])}
    padded = {
        "input_ids": torch.stack([ids, functional.pad(ids[:4], (0, 7))]),
        "position_ids": torch.stack([torch.tensor([*range(4), *range(7)]), functional.pad(torch.arange(4), (0, 7))]),
        "attention_mask": torch.tensor([[1] * 11, [1] * 4 + [0] * 7]),
    }
    with torch.no_grad():
        apart = [model.model(part[None], use_cache=False).last_hidden_state[0] for part in (ids[:4], ids[4:])]
        torch.testing.assert_close(hidden_states(model, packed)[0], torch.cat(apart), rtol=1e-4, atol=1e-5)
        found = hidden_states(model, padded)
    torch.testing.assert_close(found[0], torch.cat(apart), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1, :4], apart[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_told_by_a_mask_alone(side):
    model = tiny_model()
    ids = torch.randint(3, 259, (6,), generator=torch.Generator().manual_seed(0))
    pad = (3, 0) if side == "left" else (0, 3)
    batch = {"input_ids": functional.pad(ids, pad)[None]}
    batch["attention_mask"] = functional.pad(torch.ones_like(ids), pad)[None]
    with torch.no_grad():
        found = hidden_states(model, batch)[0][batch["attention_mask"][0].bool()]
        torch.testing.assert_close(found, model.model(ids[None]).last_hidden_state[0], rtol=1e-4, atol=1e-5)


def test_right_padding_stays_on_the_fast_causal_path():
    """Positions of padding count on, so transformers finds nothing packed and makes no (B, 1, T, T) mask."""
    from transformers.masking_utils import find_packed_sequence_indices

    rows = [{"input_ids": torch.arange(n), "position_ids": torch.arange(n)} for n in (3, 5)]
    batch = collate([row | {"attention_mask": torch.ones_like(row["input_ids"])} for row in rows])
    assert find_packed_sequence_indices(batch["position_ids"]) is not None
    assert find_packed_sequence_indices(position_ids(batch)) is None


def test_targets_leave_out_masked_labels_and_first_tokens():
    batch = {
        "labels": torch.tensor([[7, 7, -100, 7, 7, -100]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
    }
    assert targets(batch).tolist() == [[True, False, False, True, False]]
    del batch["position_ids"]
    assert targets(batch).tolist() == [[True, False, True, True, False]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"micro_batch": 3}, "multiple of 3"),
        ({"warmup_steps": 100}, "warm-up"),
        ({"tokens": 5}, "at least one step"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(tmp_path, changes, words):
    with pytest.raises(UserError, match=words) as error:
        run(tmp_path, **changes)
    assert "\n" not in str(error.value)


def test_nothing_on_the_screen_without_a_terminal(tmp_path, capfd):
    run(tmp_path, tokens=100, warmup_steps=0)
    assert capfd.readouterr() == ("", "")


def test_empty_data_is_one_line(tmp_path):
    class Nothing(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(UserError, match="training data is empty"):
        run(tmp_path, rows=Nothing())
    with pytest.raises(UserError, match="held-out data has no target"):
        train(tiny_model(), loss=cross_entropy, batches=Rows(), heldout=[], settings=settings(), folder=tmp_path)


def test_a_full_disk_is_one_line_and_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    import shutil

    usage, calls = shutil.disk_usage, []

    def disk_usage(path):
        calls.append(path)
        return usage(path) if len(calls) == 1 else SimpleNamespace(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(UserError, match="free"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if "checkpoint" in path.name] == ["checkpoint-2"]


def processes():
    """Real processes, forked from a server that has done the slow imports once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["compressor.distill", "models"])
    return context


def become_rank(index, port):
    """What a launcher tells each of two processes."""
    os.environ |= {
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)


def in_two_processes(rank, folder):
    """What `rank(index, port, folder, queue)` puts into the queue in two processes, in order; both have to end well."""
    context = processes()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = context.Queue()
    ranks = [context.Process(target=rank, args=(index, port, folder, queue)) for index in range(2)]
    for process in ranks:
        process.start()
    reports = sorted(queue.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    return reports


def rank(index, port, folder, queue):
    become_rank(index, port)
    wrapped = []

    def loss(model, batch):
        wrapped.append(torch.distributed.is_initialized())
        return cross_entropy(model, batch)

    result, weights = run(folder, loss=loss, micro_batch=2)
    queue.put((index, all(wrapped), result.history, {name: w.tolist() for name, w in weights.items()}))


def test_two_processes_equal_one(whole, tmp_path):
    """Data parallel with gloo: rows are shared out, the loss curve is one process's at the same batch."""
    reports = in_two_processes(rank, tmp_path)
    assert all(report[1] for report in reports)
    assert reports[0][3] == reports[1][3]
    result, weights, _ = whole
    for name in ("loss", "grad_norm", "heldout_loss", "tokens"):
        found = values(reports[0][2], name)
        torch.testing.assert_close(found, values(result.history, name), rtol=2e-4, atol=0)
    for name, weight in weights.items():
        torch.testing.assert_close(torch.tensor(reports[0][3][name]), weight, rtol=0, atol=2e-4, msg=name)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{result.steps}").state_dict()
    assert stored["lm_head.weight"].tolist() == reports[0][3]["lm_head.weight"]
