"""Alignment: what TRL's trainers read, pairs made of the models' own answers, kills, and the stage in a run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from models import save_tiny, tiny_tokenizer
from safetensors.torch import load_file
from test_cli import call

import compressor
from compressor import align, data
from compressor.align import pairs, training
from compressor.checkpoint import load_tokenizer
from compressor.errors import UserError
from compressor.recipe import Align
from compressor.run import outcome_counts, read_json
from compressor.runtime import TorchRuntime

ASK = [{"role": "user", "content": "2+2?"}]
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, two: Path) -> bool:
    ours, theirs = weights(one), weights(two)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def write_lines(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# --- reading pairs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": ASK, "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "2+2?", "chosen": [*ASK, GOOD], "rejected": [*ASK, BAD], "score": 3},
        {"chosen": [*ASK, GOOD], "rejected": [*ASK, BAD]},
        {"prompt": "2+2?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": ASK, "chosen": "4", "rejected": "5"},
    ],
)
def test_every_form_of_a_pair_in_messages_is_read_alike(raw, tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", [raw])
    assert list(data.preferences(str(path))) == [{"prompt": ASK, "chosen": GOOD, "rejected": BAD}]


def test_pairs_in_text_and_with_tools_in_files_of_two_kinds(tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    text = {"prompt": "a", "chosen": "b", "rejected": "c"}
    table = arrow.Table.from_pylist([text, text | {"rejected": "b"}])  # the second one tells nothing
    parquet.write_table(table, tmp_path / "pairs.parquet")
    assert list(data.preferences(str(tmp_path / "pairs.parquet"))) == [text]
    raw = {"prompt": ASK, "chosen": [GOOD], "rejected": [BAD], "tools": json.dumps([{"name": "add"}])}
    [pair] = data.preferences(str(write_lines(tmp_path / "pairs.jsonl", [raw])))
    assert pair["tools"] == [{"name": "add"}]


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"prompt": "a", "chosen": "b"}, 'line 2: found the keys chosen, prompt; expected a record with "prompt"'),
        ({"chosen": "a", "rejected": "b"}, "two assistant's answers to one prompt"),
        ({"chosen": [*ASK, GOOD], "rejected": [BAD]}, "two assistant's answers to one prompt"),
        ({"prompt": ASK, "chosen": [GOOD, *ASK], "rejected": [BAD]}, "two assistant's answers to one prompt"),
        ({"prompt": ASK, "chosen": [GOOD], "rejected": [{"role": "assistant"}]}, "line 2, message 2"),
        ("text", "found the keys nothing"),
    ],
)
def test_anything_else_is_one_line_with_its_place(raw, says, tmp_path):
    good = {"prompt": ASK, "chosen": [GOOD], "rejected": [BAD]}
    path = write_lines(tmp_path / "pairs.jsonl", [good, raw])
    with pytest.raises(UserError, match=says) as raised:
        list(data.preferences(str(path)))
    assert "\n" not in str(raised.value)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_only_what_the_assistant_wrote_is_learned_with_its_end_mark():
    tokenizer = tiny_tokenizer()
    assert "{% generation" not in tokenizer.chat_template  # TRL's own masks would need its marks
    chat = {"messages": [*ASK, GOOD, {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "yes"}]}
    long = {"messages": [*ASK, {"role": "assistant", "content": "x" * 200}]}
    [row] = align.chats([{"text": "prose"}, long, chat], tokenizer, count=5, context=128)
    learned = [token for token in row["labels"] if token != data.IGNORED]
    assert tokenizer.decode(learned) == "4<|end|>yes<|end|>"
    assert [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100] == learned
    with pytest.raises(UserError, match="no chat"):
        align.chats([{"text": "prose"}, long], tokenizer, count=5, context=128)


def test_pairs_of_one_prompt_stay_on_one_side_and_a_tenth_is_held_out():
    rows = [
        {"prompt": [{"role": "user", "content": str(i // 2)}], "chosen": [GOOD], "rejected": [BAD], "tools": None}
        for i in range(100)
    ]
    train, heldout = align.divided(rows, heldout=1000)
    assert (len(train), len(heldout)) == (90, 10)
    assert align.divided(rows[::-1], heldout=1000)[1] == heldout[::-1]  # by what they are, not where they stand
    asked = [{row["prompt"][0]["content"] for row in side} for side in (train, heldout)]
    assert not asked[0] & asked[1]
    assert len(align.divided(rows, heldout=3)[1]) == 6
    with pytest.raises(UserError, match="two at least"):
        align.divided(rows[:2], heldout=1)


def test_text_becomes_an_exchange_where_there_is_a_template_and_stays_text_elsewhere():
    tokenizer, plain = tiny_tokenizer(), tiny_tokenizer()
    plain.chat_template = None
    text = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    assert align.preference_rows([text], plain, context=128) == [text]
    chat = {"prompt": ASK, "chosen": GOOD, "rejected": BAD}
    expected = [{"prompt": ASK, "chosen": [GOOD], "rejected": [BAD], "tools": None}]
    assert align.preference_rows([text], tokenizer, context=128) == expected
    assert align.preference_rows([chat], tokenizer, context=128) == expected
    with pytest.raises(UserError, match="no preference pair fits"):
        align.preference_rows([chat], tokenizer, context=8)
    with pytest.raises(UserError, match="chat template"):
        align.preference_rows([chat], plain, context=128)


# --- pairs made of answers --------------------------------------------------------------------------------------------


def answer(side: str, passed: int, *, whole: bool = True, text: str = "") -> pairs.Answer:
    return pairs.Answer(side, text, passed, whole)


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ([answer("student", 1), answer("teacher", 2)], (1, 0)),
        ([answer("teacher", 2), answer("student", 2), answer("student", 1)], (1, 2)),  # its own first, chosen ...
        ([answer("teacher", 0), answer("student", 0), answer("student", 1)], (2, 1)),  # ... and rejected
        ([answer("student", 2, whole=False), answer("teacher", 1), answer("student", 0)], (1, 2)),  # never a cut one
        ([answer("student", 1), answer("teacher", 1)], "tied"),
        ([answer("student", 2, whole=False), answer("teacher", 1)], "tied"),
        ([answer("student", 2), answer("teacher", 1), answer("student", 0, whole=False)], (0, 1)),  # on neither side
        ([answer("student", 1, whole=False), answer("teacher", 0, whole=False)], "nothing_whole"),
    ],
)
def test_more_checks_passed_is_preferred_and_ties_are_dropped(answers, found):
    ranked = align.ranked(answers)
    assert ranked == (found if isinstance(found, str) else tuple(answers[i] for i in found))


def lengths(task: dict, text: str) -> int:
    """Checks a random model passes sometimes: an answer of an even number of characters, one with a digit."""
    return (len(text) % 2 == 0) + any(letter.isdigit() for letter in text)


def test_making_pairs_goes_on_after_a_kill_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "SHARD_PROMPTS", 4)
    for name, seed in (("teacher", 0), ("student", 1)):
        save_tiny(tmp_path / name, seed=seed)
    tasks = [{"messages": [{"role": "user", "content": str(i)}], "check": {"a": 1, "b": 2}} for i in range(18)]
    opened: list[str] = []

    def build(folder: Path, score=lengths, **changes):
        def model(name: str):
            opened.append(name)
            return TorchRuntime(tmp_path / name, batch_size=8)

        settings = {"samples": 20, "temperature": 1.0, "max_new_tokens": 60, "seed": 3, "about": {"student": "b"}}
        models = {"teacher": lambda: model("teacher"), "student": lambda: model("student")}
        return align.build(folder, **models, tasks=tasks, score=score, **settings | changes)

    calm = build(tmp_path / "calm")
    counts = outcome_counts(calm)
    assert counts["pairs"] >= 3
    assert counts["pairs"] + counts["tied"] + counts["nothing_whole"] == 18
    assert counts["pairs"] == counts["chosen_teacher"] + counts["chosen_student"]
    assert counts["rejected_student"] > 0

    scored = 0

    def dying(task: dict, text: str) -> int:
        nonlocal scored
        scored += 1
        if scored > 200:  # in the third shard: 21 answers to each of 4 tasks
            raise KeyboardInterrupt
        return lengths(task, text)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "killed", score=dying)
    begun = read_json(tmp_path / "killed" / "index.json")
    assert not begun["complete"]
    assert len(begun["shards"]) == 2
    assert build(tmp_path / "killed") == calm
    names = [f"{i:05d}.jsonl" for i in range(5)]
    assert sorted(path.name for path in (tmp_path / "calm" / "data").iterdir()) == names
    for name in names:
        assert (tmp_path / "calm/data" / name).read_bytes() == (tmp_path / "killed/data" / name).read_bytes()
    opened.clear()
    assert build(tmp_path / "killed") == calm
    assert not opened  # a finished one needs no model
    found = list(data.preferences(str(tmp_path / "calm" / "data")))
    assert len(found) == counts["pairs"]
    assert all(lengths({}, pair["chosen"]["content"]) > lengths({}, pair["rejected"]["content"]) for pair in found)
    with pytest.raises(UserError, match="another student"):
        build(tmp_path / "calm", about={"student": "c"})
    with pytest.raises(UserError, match="no prompt"):
        build(tmp_path / "even", score=lambda task, text: 1)


# --- training ---------------------------------------------------------------------------------------------------------

SETTINGS = Align(batch=4, micro_batch=2, sft_lr=1e-3, dpo_lr=1e-4, beta=0.2)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("start") / "model", tie_word_embeddings=True)


def rows_of(stage: str, count: int = 44) -> tuple[list[dict], list[dict]]:
    """Rows that can be learned, some of them with tools of all shapes."""
    tokenizer = tiny_tokenizer()
    words = [("yes", "no"), ("up", "down"), ("left", "right")]
    asked = [[{"role": "user", "content": f"say {words[i % 3][0]} {i}"}] for i in range(count)]
    answers = [[{"role": "assistant", "content": word} for word in words[i % 3]] for i in range(count)]
    if stage == "sft":
        records = [{"messages": [*ask, good]} for ask, (good, _) in zip(asked, answers, strict=True)]
        rows = align.chats(records, tokenizer, count=count, context=128)
        return rows[4:], rows[:4]
    found = [
        {"prompt": ask, "chosen": good, "rejected": bad, "tools": [{"name": f"f{i}", f"p{i}": i}] if i % 2 else None}
        for i, (ask, (good, bad)) in enumerate(zip(asked, answers, strict=True))
    ]
    return align.divided(align.preference_rows(found, tokenizer, context=128), heldout=4)


def trained(stage: str, start: Path, out: Path, *, settings: Align = SETTINGS, count: int = 44) -> align.Aligned:
    tokenizer = load_tokenizer(start)
    places = {"folder": out / stage, "metrics": out / f"{stage}.jsonl", "seed": 5}
    out.mkdir(exist_ok=True)
    return align.train(stage, start, *rows_of(stage, count), tokenizer=tokenizer, settings=settings, **places)


@pytest.fixture(scope="module")
def calm(start, tmp_path_factory) -> dict[str, tuple[Path, align.Aligned]]:
    out = tmp_path_factory.mktemp("calm")
    return {stage: (out, trained(stage, start, out)) for stage in ("sft", "dpo")}


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_training_lowers_the_heldout_loss_and_leaves_stock_checkpoints(stage, calm, start):
    out, result = calm[stage]
    facts = result.facts()
    assert facts["steps"] == (10 if stage == "sft" else len(rows_of("dpo")[0]) // 4)
    first, last = facts["heldout_loss"]
    assert last < first
    assert not same(result.folder, start)
    assert result.folder.name == f"checkpoint-{facts['best_step']}"
    names = {path.name for path in result.folder.iterdir()}
    assert {"model.safetensors", "chat_template.jinja", "trainer_state.json"} <= names
    assert not {"README.md", "pytorch_model.bin"} & names
    lines = [json.loads(line) for line in (out / f"{stage}.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert {"step", "loss", "lr", "grad_norm"} <= {key for line in lines for key in line}


def test_dpo_starts_at_log_2_and_learns_to_prefer(calm):
    _, result = calm["dpo"]
    facts = result.facts()
    assert facts["heldout_margin"][0] == 0
    assert facts["heldout_margin"][1] > 0.1
    assert facts["heldout_accuracy"] == [0, 1]


def test_dpo_without_the_preferred_answers_own_loss_is_the_papers(start, tmp_path):
    result = trained("dpo", start, tmp_path, settings=SETTINGS.model_copy(update={"nll_weight": 0.0}), count=8)
    assert result.history[0]["heldout_loss"] == pytest.approx(0.693147, abs=1e-5)  # -log sigmoid(0)


def test_trl_counts_the_answer_and_its_end_mark_and_sees_the_tools(calm, start):
    out, _ = calm["dpo"]
    tokenizer = load_tokenizer(start)
    caches = sorted((out / "dpo" / "data" / "train_dataset").glob("cache-*.arrow"))
    [tokens] = [found for file in caches if "chosen_ids" in (found := Dataset.from_file(str(file))).column_names]
    for row in tokens:
        assert tokenizer.decode(row["prompt_ids"]).endswith("<|assistant|>")
        assert tokenizer.decode(row["chosen_ids"]) == row["chosen"][0]["content"] + "<|end|>"
        assert tokenizer.decode(row["rejected_ids"]) == row["rejected"][0]["content"] + "<|end|>"
    schemas = [json.loads(row["tools"]) for row in tokens]
    assert {len(schema[0]) for schema in schemas if schema} == {2}  # no other row's keys are in it


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_kill_in_a_step_and_one_in_a_checkpoint_end_in_the_same_bits(stage, calm, start, tmp_path, monkeypatch):
    out, expected = calm[stage]

    def dying(name: str, holder: type, at: int) -> None:
        original = getattr(holder, name)

        def wrapped(self, args, state, *rest, **named):
            if state.global_step == at:
                raise KeyboardInterrupt
            return original(self, args, state, *rest, **named)

        monkeypatch.setattr(holder, name, wrapped)

    dying("on_step_end", training.Progress, 4)
    with pytest.raises(KeyboardInterrupt):
        trained(stage, start, tmp_path)
    monkeypatch.undo()
    [last] = (tmp_path / stage).glob("checkpoint-*")
    assert last.name == "checkpoint-3"
    # what a kill leaves of a checkpoint that was being written
    half = tmp_path / stage / ".checkpoint-4.part"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")

    trainer = {"sft": training.Sft, "dpo": training.Dpo}[stage]
    saved = trainer._save_rng_state

    def torn(self, folder):
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        saved(self, folder)

    monkeypatch.setattr(trainer, "_save_rng_state", torn)
    with pytest.raises(KeyboardInterrupt):
        trained(stage, start, tmp_path)
    monkeypatch.undo()
    assert max(int(path.name[11:]) for path in (tmp_path / stage).glob("checkpoint-*")) == 6
    result = trained(stage, start, tmp_path)
    assert not [path for path in (tmp_path / stage).iterdir() if path.name.startswith(".")]
    assert result.history == expected.history
    assert same(result.folder, expected.folder)
    assert (tmp_path / f"{stage}.jsonl").read_bytes() == (out / f"{stage}.jsonl").read_bytes()
    assert trained(stage, start, tmp_path) == result  # finished: nothing is trained again


def test_a_begun_training_refuses_other_rows(calm, start):
    out, _ = calm["sft"]
    with pytest.raises(UserError, match="another rows"):
        trained("sft", start, out, count=43)


def test_where_no_step_is_better_what_came_in_is_kept(start, tmp_path):
    result = trained("dpo", start, tmp_path, settings=SETTINGS.model_copy(update={"dpo_lr": 1.0}), count=24)
    assert result.folder == start
    assert "no step was better" in result.describe()


# --- the stage in a run -----------------------------------------------------------------------------------------------

SMALL = {
    "teacher": "demo",
    "target": "50%",
    "data": {"context": 320},
    "importance": {"samples": 8, "batch_size": 8},
    "distill": {"tokens": 4000, "heldout_rows": 8, "warmup_steps": 1, "eval_every": 4, "save_every": 4},
    "align": {"examples": 24, "prompts": 24, "samples": 2, "max_new_tokens": 32, "heldout": 4, "batch": 4},
    "evaluate": {"tokens": 500, "prompts": 2, "batch_size": 8, "max_new_tokens": 32},
    "export": {"formats": []},
    "seed": 1,
}
SMALL["align"] |= {"stages": ["sft", "dpo"], "micro_batch": 2}  # pyright: ignore


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "calm"
    compressor.distill(SMALL, out=folder)
    return folder


def test_a_run_aligns_what_it_distilled(finished):
    stages = read_json(finished / "run.json")["stages"]
    assert list(stages) == ["importance", "surgery", "distill", "align", "evaluate", "report"]
    made = stages["align"]["pairs"]
    assert made["prompts"] == 24
    assert made["pairs"] == made["chosen_teacher"] + made.get("chosen_student", 0) >= 12  # the pruned one cannot speak
    assert stages["align"]["sft"]["rows"] == 24
    assert stages["align"]["dpo"]["rows"] + stages["align"]["dpo"]["heldout_rows"] == made["pairs"]
    assert {"heldout_loss", "heldout_margin", "heldout_accuracy"} <= stages["align"]["dpo"].keys()
    evaluation = read_json(finished / "evaluation.json")
    assert list(evaluation) == ["teacher", "pruned", "distilled", "student"]
    assert evaluation["distilled"]["perplexity"] != evaluation["student"]["perplexity"]
    report = read_json(finished / "report.json")
    assert report["align"] == {key: stages["align"][key] for key in ("sft", "pairs", "dpo")}
    assert report["distilled"]["perplexity"] == evaluation["distilled"]["perplexity"]
    for page in ("report.md", "report.html"):
        text = (finished / page).read_text()
        assert "distilled" in text
        assert f"{made['pairs']:,} made of 24 prompts" in text
    assert "before alignment" in (finished / "student" / "README.md").read_text()


def test_the_aligned_student_is_a_stock_folder_with_the_distilled_ones_configs(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (finished / "student" / name).read_bytes() == (finished / "distilled" / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(finished / "student", trust_remote_code=False)
    assert model.dtype == torch.bfloat16  # the teacher's
    assert AutoTokenizer.from_pretrained(finished / "student").chat_template
    assert not same(finished / "student", finished / "distilled")


@pytest.mark.slow
def test_a_run_killed_in_every_part_of_alignment_ends_in_the_same_bits(finished, tmp_path):
    out = tmp_path / "killed"
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(SMALL))
    code = "import json, sys, compressor; compressor.distill(json.load(open(sys.argv[1])), out=sys.argv[2])"

    def child() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", code, str(recipe), str(out)], stderr=subprocess.PIPE)

    def steps(stage: str) -> int:
        return (
            len((out / f"metrics-{stage}.jsonl").read_text().splitlines()) if reached(f"metrics-{stage}.jsonl") else 0
        )

    def reached(name: str) -> bool:
        return (out / name).exists()

    rng = random.Random(2)
    for moment in (lambda: steps("sft") > 3, lambda: reached("pairs/data"), lambda: steps("dpo") > 2):
        running = child()
        while not moment() and running.poll() is None:
            time.sleep(0.01)
        time.sleep(0.2 * rng.random())
        os.kill(running.pid, signal.SIGKILL)
        running.communicate()
        assert running.returncode == -signal.SIGKILL, "the run was over before it was killed"
        assert not reached("student")
    last = child()
    _, errors = last.communicate()
    assert last.returncode == 0, errors.decode()
    assert same(out / "student", finished / "student")
    for name in ("metrics-sft.jsonl", "metrics-dpo.jsonl", "pairs/index.json", "pairs/data/00000.jsonl"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.slow
def test_two_launched_processes_align_together(tmp_path):
    """`torchrun compressor distill`: both train, the first one alone makes the pairs."""
    out = tmp_path / "run"
    small = json.loads(json.dumps(SMALL))
    small["distill"] |= {"batch": 4, "micro_batch": 2}
    (tmp_path / "recipe.yaml").write_text(json.dumps(small))  # JSON is YAML
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "compressor.cli"]
    line += ["distill", "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(out), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *line], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["align"]
    assert found["pairs"]["prompts"] == 24
    for stage in ("sft", "dpo"):
        assert found[stage]["heldout_loss"][1] < found[stage]["heldout_loss"][0]
        last = out / "checkpoints" / f"align-{stage}" / f"checkpoint-{found[stage]['steps']}"
        assert len([*last.glob("rng_state_*.pth")]) == 2  # both took part
    assert (out / "student" / "model.safetensors").exists()


# --- what is told before anything is computed -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("dpo,sft", "align.stages is dpo,sft; expected each once, sft before dpo; give --align sft,dpo"),
        ("sft,sft", "align.stages is sft,sft; expected each once"),
        ("ppo", "`align.stages.0` is 'ppo'"),
    ],
)
def test_stages_out_of_order_twice_or_unknown_are_one_line(words, says, tmp_path, capsys):
    asked = ["distill", "--teacher", "demo", "--target", "50%", "--align", words, "--out", str(tmp_path / "run")]
    code, _, errors = call(capsys, *asked)
    assert code == 2
    assert says in errors
    assert len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("template", "section", "says"),
    [
        (False, {"stages": ["dpo"]}, "no chat template"),
        (False, {"stages": ["sft"], "data": "CHATS"}, "no chat template"),
        (True, {"stages": ["sft"]}, "no chat that fits"),
        (True, {"stages": ["sft", "dpo"], "data": "CHATS", "pairs": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        (True, {"stages": ["dpo"], "pairs": "CHATS"}, 'expected a record with "prompt", "chosen"'),
        (True, {"stages": ["dpo"], "tasks": "CHATS"}, "a task needs"),
        (True, {"stages": ["sft"], "data": "CHATS", "micro_batch": 3}, "expected a multiple of 3"),
    ],
)
def test_what_cannot_be_aligned_is_told_before_anything_is_computed(template, section, says, tmp_path):
    save_tiny(tmp_path / "teacher")
    if not template:
        (tmp_path / "teacher" / "chat_template.jinja").unlink()
    texts = write_lines(tmp_path / "data.jsonl", ({"text": f"the lamp of river {i} stone boat"} for i in range(60)))
    asked = ([{"role": "user", "content": f"{i}+2?"}] for i in range(60))
    chats = write_lines(tmp_path / "chats.jsonl", ({"messages": [*ask, GOOD]} for ask in asked))
    section = {key: str(chats) if value == "CHATS" else value for key, value in section.items()}
    values = {"data": {"source": str(texts), "context": 48, "heldout_fraction": 0.2}, "align": section}
    values |= {"distill": SMALL["distill"] | {"batch": 4, "micro_batch": 2}, "target": "ffn=48,hidden=36"}
    with pytest.raises(UserError, match=says) as raised:
        compressor.distill(values | {"teacher": str(tmp_path / "teacher")}, out=tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_plan_counts_alignment():
    plain = compressor.plan({"teacher": "llama-3.1-8b", "target": "4b"})
    aligned = compressor.plan({"teacher": "llama-3.1-8b", "target": "4b", "align": {"stages": ["sft", "dpo"]}})
    assert [stage.name for stage in aligned.stages][-3:] == ["distill", "align", "evaluate"]
    assert "align" not in [stage.name for stage in plain.stages]
    given = {"stages": ["dpo"], "pairs": "some/pairs"}
    cheaper = compressor.plan({"teacher": "llama-3.1-8b", "target": "4b", "align": given})
    flops = {name: plan.stages[-2].flops for name, plan in (("both", aligned), ("given", cheaper))}
    assert 0 < flops["given"] < flops["both"]
    assert aligned.recipe.align.dpo_lr < aligned.recipe.align.sft_lr < aligned.recipe.distill.lr
