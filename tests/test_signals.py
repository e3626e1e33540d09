"""Caches of what a teacher says: what is kept, what is lost by it, kills, and what does not belong together."""

import json
import os
import signal as signals_of_the_system
import subprocess
import sys
from itertools import islice

import pytest
import torch
from models import save_tiny, tiny_model
from test_train import Rows, settings

from compressor.data import collate, targets
from compressor.distill import distillation_loss
from compressor.errors import UserError
from compressor.losses import Dense, Sampled, TopK
from compressor.run import alone
from compressor.signals import Cached, Online, build, bytes_per_target, head_weight, predicting
from compressor.signals.cache import SHARD_TARGETS
from compressor.signals.cached import OPEN_SHARDS
from compressor.teacher import load

IDS = 259
ROWS = 24


def rows(count=ROWS, **options):
    return list(islice(iter(Rows(**options)), count))


def about(kind="topk", **changes):
    found = {"version": 2, "kind": kind, "teacher": "t", "tokenizer": "k", "vocab": IDS}
    return found | ({} if kind == "hidden" else {"keep": 64, "temperature": 1.0}) | changes


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load(save_tiny(tmp_path_factory.mktemp("teacher") / "t", hidden_size=72, seed=5, vocab_size=270))


def made(folder, teacher, kind="topk", *, batch_size=4, given=None, **changes):
    what = about(kind, **changes)
    build(folder, lambda: teacher, given or rows(), about=what, batch_size=batch_size)
    return Cached(folder, what)


def loss_of(signal, student, batch, **changes):
    return distillation_loss(signal, settings=settings(**changes), vocab=IDS)(student, batch)


@pytest.fixture
def student():
    return tiny_model(seed=3)


@pytest.fixture
def batch():
    return collate(rows()[3:9])  # rows as no batch of the cache held them


def test_hidden_states_give_the_online_loss_and_gradient(teacher, student, batch, tmp_path):
    cached = made(tmp_path / "cache", teacher, "hidden")
    for divergence, temperature in (("forward_kl", 1.0), ("jsd", 2.0)):
        options = {"divergence": divergence, "temperature": temperature}
        online = loss_of(Online(teacher), student, batch, **options)
        found = loss_of(cached, student, batch, **options)
        torch.testing.assert_close(found.loss, online.loss, rtol=1e-6, atol=1e-6)
        wanted = torch.autograd.grad(online.loss, list(student.parameters()))
        for ours, theirs in zip(torch.autograd.grad(found.loss, list(student.parameters())), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_top_k_are_the_teachers(teacher, batch, tmp_path, temperature):
    cached = made(tmp_path / "cache", teacher, temperature=temperature, keep=7)
    counted = targets(batch)
    found = cached(batch, counted)
    assert isinstance(found, TopK)
    logits = predicting(teacher, batch, counted) @ head_weight(teacher)[:IDS].t()
    log_p, ids = (logits / temperature).log_softmax(-1).topk(7)
    assert torch.equal(found.ids_NK, ids)
    torch.testing.assert_close(found.log_p_NK.float(), log_p, rtol=1e-3, atol=1e-3)
    outside = (logits / temperature).log_softmax(-1).scatter(1, ids, -torch.inf)
    torch.testing.assert_close(found.log_tail_N, outside.logsumexp(-1))
    assert outside.gather(1, found.drawn_NM).isfinite().all()
    torch.testing.assert_close(found.drawn_log_p_N, outside.gather(1, found.drawn_NM).mean(-1))
    whole = made(tmp_path / "whole", teacher, temperature=temperature, keep=IDS + 5)  # nothing is left out
    with torch.no_grad():
        exact = loss_of(Online(teacher), tiny_model(seed=3), batch, temperature=temperature).loss
        found = loss_of(whole, tiny_model(seed=3), batch, temperature=temperature).loss
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_of_the_top_64_is_within_a_hundredth_of_the_online_one(teacher, student, tmp_path, temperature):
    """An untrained teacher spreads itself over all ids, which is the hard case: the bucket alone misses a tenth."""
    many = rows(240)  # the draws are unbiased: their noise falls with the number of targets
    batch = collate(many)
    online = loss_of(Online(teacher), student, batch, temperature=temperature).loss.item()
    cached = made(tmp_path / "cache", teacher, given=many, batch_size=40, temperature=temperature)
    assert loss_of(cached, student, batch, temperature=temperature).loss.item() == pytest.approx(online, rel=0.01)

    def bucket(batch, counted):
        return cached(batch, counted)._replace(drawn_NM=None)

    assert loss_of(bucket, student, batch, temperature=temperature).loss.item() < 0.9 * online


def test_draws_are_the_teachers_and_do_not_depend_on_the_batch(teacher, student, batch, tmp_path):
    cached = made(tmp_path / "cache", teacher, "sampled", keep=400)
    found = cached(batch, targets(batch))
    assert isinstance(found, Sampled)
    online = loss_of(Online(teacher), student, batch).loss.item()
    assert loss_of(cached, student, batch).loss.item() == pytest.approx(online, rel=0.02)
    other = made(tmp_path / "other", teacher, "sampled", keep=400, batch_size=3)
    assert torch.equal(found.ids_NK, other(batch, targets(batch)).ids_NK)


def test_bytes_a_token_are_what_lies_on_the_disk(teacher, tmp_path):
    cached = made(tmp_path / "cache", teacher, keep=8)
    count = sum(int(targets(collate([row])).sum()) for row in rows())
    sizes = sum(file.stat().st_size for file in (tmp_path / "cache").glob("0*.safetensors"))
    assert cached.bytes_per_token == sizes / count
    kept = 8 * (2 + 2) + 4 + 32 * 2 + 4  # ids of 16 bits in float16, the tail, 32 draws of it and their logarithm
    assert kept == bytes_per_target("topk", keep=8, vocab=IDS, width=72, value=4)
    assert kept < cached.bytes_per_token < kept + 16  # and the rows' keys


def test_of_many_shards_few_are_open_and_a_whole_cache_needs_no_lock(teacher, batch, tmp_path, monkeypatch):
    one = made(tmp_path / "one", teacher, keep=4)
    monkeypatch.setitem(SHARD_TARGETS, "topk", 1)
    cached = made(tmp_path / "many", teacher, keep=4, batch_size=1)
    assert len(cached.index["shards"]) == ROWS > OPEN_SHARDS
    for row in range(ROWS):
        cached(collate(rows()[row : row + 1]), targets(collate(rows()[row : row + 1])))
    assert cached._shard.cache_info().currsize == OPEN_SHARDS
    found, expected = (signal(batch, targets(batch)) for signal in (cached, one))
    assert torch.equal(found.ids_NK, expected.ids_NK)
    torch.testing.assert_close(found.log_tail_N, expected.log_tail_N)
    with alone(tmp_path / "many"):  # as another run that reads it might
        assert made(tmp_path / "many", teacher, keep=4).index == cached.index


def test_a_cache_that_was_killed_ends_in_the_same_bits(teacher, tmp_path, monkeypatch):
    monkeypatch.setitem(SHARD_TARGETS, "sampled", 40)
    made(tmp_path / "whole", teacher, "sampled", keep=4)
    loads: list[bool] = []
    for stop in (1, 9, 17, 21):

        def killed(count, stop=stop, seen=[0]):  # noqa: B006 - counts the rows of this build
            seen[0] += count
            if seen[0] >= stop:
                raise KeyboardInterrupt

        what = about("sampled", keep=4)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "cut", lambda: teacher, rows(), about=what, batch_size=4, progress=killed)
        with pytest.raises(UserError, match="is unfinished; expected a whole cache"):
            Cached(tmp_path / "cut", what)
    made(tmp_path / "cut", teacher, "sampled", keep=4)
    assert {file.name: file.read_bytes() for file in (tmp_path / "cut").iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()
    }
    what = about("sampled", keep=4)
    build(tmp_path / "cut", lambda: loads.append(True), rows(), about=what, batch_size=4)  # pyright: ignore[reportArgumentType]
    assert not loads  # nothing is missing, so no teacher is loaded


def test_a_real_kill_between_any_two_writes_is_mended(tmp_path):
    script = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
import compressor.signals.cache as cache
cache.SHARD_TARGETS["topk"] = 1
from test_signals import about, rows, tiny_model
from compressor.signals import build
from pathlib import Path
teacher = tiny_model(seed=5).requires_grad_(False)
tell = lambda count: print(count, flush=True)
build(Path(sys.argv[1]), lambda: teacher, rows(), about=about("topk", keep=4), batch_size=2, progress=tell)
"""
    for turns in (2, 3, 1):
        with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "cut")], stdout=subprocess.PIPE) as child:
            for _ in range(turns):
                assert child.stdout.readline()
            os.kill(child.pid, signals_of_the_system.SIGKILL)
    for name in ("cut", "whole"):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], check=True, stdout=subprocess.DEVNULL)
    assert {file.name: file.read_bytes() for file in (tmp_path / "cut").glob("[!.]*")} == {
        file.name: file.read_bytes() for file in (tmp_path / "whole").glob("[!.]*")
    }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher": "other"}, r"was made with another teacher \(t\); expected other"),
        ({"tokenizer": "other"}, "another tokenizer"),
        ({"temperature": 2.0}, r"another temperature \(1.0\); expected 2.0"),
        ({"keep": 9}, "another keep"),
        ({"kind": "sampled"}, "another kind"),
        ({"vocab": 5}, "another vocab"),
    ],
)
def test_another_cache_is_refused(teacher, tmp_path, changes, says):
    made(tmp_path / "cache", teacher)
    for use in (lambda what: Cached(tmp_path / "cache", what), lambda what: made_again(tmp_path, teacher, what)):
        with pytest.raises(UserError, match=says):
            use(about() | changes)


def made_again(tmp_path, teacher, what):
    build(tmp_path / "cache", lambda: teacher, rows(), about=what, batch_size=4)


def test_what_is_no_cache_and_rows_it_does_not_hold_are_refused(teacher, tmp_path, student):
    with pytest.raises(UserError, match=r"holds no cache; expected its index\.json; build one"):
        Cached(tmp_path, about())
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty and has no index\.json; expected a new folder"):
        made(tmp_path, teacher)
    cached = made(tmp_path / "cache", teacher)
    strange = collate(rows(2, seed=77))
    with pytest.raises(UserError, match="does not hold a row of this run"):
        loss_of(cached, student, strange)
    index = json.loads((tmp_path / "cache" / "index.json").read_text())
    assert index["about"] == about()


def test_a_disk_without_room_is_told_before_the_teacher_is_loaded(tmp_path):
    def never():
        raise AssertionError("the teacher was loaded")

    with pytest.raises(UserError, match=r"cannot write .*GB free; expected"):
        build(tmp_path / "cache", never, rows(), about=about(), batch_size=4, expected=2**60)


def test_dense_rows_are_those_of_the_teacher(teacher, batch):
    found = Online(teacher)(batch, targets(batch))
    assert isinstance(found, Dense)
    assert not found.hidden_NE.requires_grad
    assert len(found.hidden_NE) == int(targets(batch).sum())


def test_without_a_signal_the_labels_are_learned(student, batch):
    found = distillation_loss(None, settings=settings(), vocab=IDS)(student, batch)
    counted = targets(batch)
    logits = (predicting(student, batch, counted) @ head_weight(student).t())[:, :IDS]
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:][counted], reduction="sum")
    torch.testing.assert_close(found.loss, expected)
    assert found.parts.keys() == {"ce"}
