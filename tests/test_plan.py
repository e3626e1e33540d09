"""The plan from configs alone: exact counts, and estimates against what torch really keeps and does."""

import importlib
import io
import json
import math
from dataclasses import replace

import pytest
from models import tiny_config, tiny_model

from compressor.architecture import named_config
from compressor.errors import UserError
from compressor.recipe import build
from compressor.shape import Shape
from compressor.units import size

planning = importlib.import_module("compressor.plan")  # `compressor.plan` is the function
RATE = planning.Rate(device="test", precision="fp32", flops_per_second=1e12, bytes_per_second=1e10)


def recipe(teacher="llama-3.1-8b", target="4b", **distill):
    usual = {"tokens": 1_000_000, "batch": 16, "micro_batch": 2, "precision": "fp32", "eval_every": 10}
    return build(
        {
            "teacher": teacher,
            "target": target,
            "data": {"context": 512},
            "importance": {"samples": 64, "batch_size": 2, "depth_samples": 8, "depth": "perplexity"},
            "distill": usual | {"heldout_rows": 32, "chunk_tokens": 128} | distill,
            "evaluate": {"tokens": 10_000, "prompts": 25, "batch_size": 8, "max_new_tokens": 64},
        }
    )


def shape_of(name: str) -> Shape:
    return Shape.from_config(named_config(name))


def stages(teacher, student, rate=RATE, **distill):
    found = planning.estimate(recipe(**distill), teacher=teacher, student=student, rate=rate)
    return {stage.name: stage for stage in found}


@pytest.fixture(scope="module")
def minitron():
    return planning.plan(recipe(target="llama-3.1-minitron-4b-width"))


def test_plan_as_json(minitron):
    found = json.loads(json.dumps(minitron.to_dict()))
    assert found["teacher"]["parameters"] == 8_030_261_248
    assert found["student"]["parameters"] == 4_512_746_496
    assert found["student"]["shape"]["hidden"] == 3072
    assert found["student"]["embedding_parameters"] + found["student"]["other_parameters"] == 4_512_746_496
    assert found["student"]["bytes"]["int4"] == 4_512_746_496 // 2
    assert found["teacher"]["kv_bytes_per_token"] == 131_072
    names = [stage["name"] for stage in found["stages"]]
    assert names == ["teacher", "importance", "surgery", "distill", "evaluate"]
    for stage in found["stages"]:
        assert stage["memory_bytes"] > 0
        assert stage["seconds"] > 0
        assert stage["note"]
    assert found["rate"]["flops_per_second"] > 1e8


def test_render_prints_both_shapes_and_every_stage(minitron):
    from rich.console import Console

    out = io.StringIO()
    planning.render(minitron, Console(file=out, width=160))
    text = out.getvalue()
    for part in (
        "8,030,261,248",
        "4,512,746,496",
        "788,004,864",
        "131,072",
        "bytes at int4",
        "evaluate",
        "measured now",
    ):
        assert part in text, part
    for stage in minitron.stages:
        assert stage.name in text


def test_teacher_by_name_by_hub_id_and_by_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert planning.teacher_config("llama-3.1-8b") == named_config("llama-3.1-8b")
    assert planning.teacher_config("meta-llama/Llama-3.1-8B") == named_config("llama-3.1-8b")
    tiny_config("qwen3").save_pretrained(tmp_path / "teacher")
    teacher = Shape.from_config(planning.teacher_config(str(tmp_path / "teacher")))
    assert (teacher.family, teacher.hidden, teacher.head_dim) == ("qwen3", 48, 16)
    # A folder of the user's own comes before a published shape of the same name.
    tiny_config("llama").save_pretrained(tmp_path / "llama-3.2-1b")
    assert planning.teacher_config("llama-3.2-1b")["hidden_size"] == 48


def test_a_folder_without_config_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        planning.plan(recipe(teacher=str(tmp_path)))


def test_distillation_counts_six_and_two():
    teacher, student = shape_of("llama-3.1-8b"), shape_of("llama-3.1-minitron-4b-width")
    matrices = [shape.parameters - shape.vocab * shape.hidden - 65 * shape.hidden for shape in (teacher, student)]
    counted = planning.distill_flops_per_token(teacher, student, context=0)
    assert counted == 6 * matrices[1] + 2 * matrices[0]
    assert (
        planning.distill_flops_per_token(teacher, student, context=0, checkpointing=True) == counted + 2 * matrices[1]
    )
    attention = 4 * 32 * 4096 * 2048
    assert planning.distill_flops_per_token(teacher, student, context=4096) - counted == 4 * attention
    # 977 steps of 1,024 tokens, one evaluation before and one every tenth step, 4 rows each of 512 tokens.
    stage = stages(teacher, student, tokens=1_000_000, batch=2, eval_every=10, heldout_rows=4)["distill"]
    both = teacher.flops_per_token(256) + student.flops_per_token(256)
    per_token = planning.distill_flops_per_token(teacher, student, context=512)
    assert stage.flops == 1_000_000 * per_token + 99 * 4 * 512 * both
    assert stage.seconds == pytest.approx(stage.flops / (planning.UTILISATION * 1e12))


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.01), ("bf16", 0.05)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activation_memory_is_what_torch_keeps(model_type, precision, tolerance, checkpointing):
    import torch

    sizes = {"hidden_size": 96, "intermediate_size": 320, "num_hidden_layers": 4}
    tokens = 64

    def kept(num_layers: int) -> tuple[Shape, int]:
        model = tiny_model(model_type, **(sizes | {"num_hidden_layers": num_layers})).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages = {}

        def pack(tensor):
            # The dict holds the tensors, so that no address is used twice.
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            # Without the cache, autocast's copies of the weights are still kept; they are taken off below.
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ):
            model.model(torch.arange(tokens)[None] % 259)
        shape = Shape.from_config(model.config)
        copies = 0
        if precision == "bf16" and not checkpointing:
            matrices = shape.flops_per_token() // 2 - shape.vocab * shape.hidden
            copies = 2 * matrices
        return shape, sum(size for size, _ in storages.values()) - copies

    shape, four = kept(4)
    _, two = kept(2)
    counted = [
        planning.activation_bytes(
            replace(shape, num_layers=layers),
            tokens=tokens,
            precision=precision,
            checkpointing=checkpointing,
        )
        for layers in (2, 4)
    ]
    assert four - two == pytest.approx(counted[1] - counted[0], rel=tolerance)


def test_memory_follows_the_recipe():
    teacher, student = (
        shape_of("llama-3.2-1b"),
        Shape.from_config(named_config("llama-3.2-1b") | {"num_hidden_layers": 8}),
    )
    usual = stages(teacher, student)
    assert usual["teacher"].memory_bytes == 4 * teacher.parameters
    distill = usual["distill"].memory_bytes
    assert distill > 4 * teacher.parameters + 16 * student.parameters
    assert stages(teacher, student, gradient_checkpointing=True)["distill"].memory_bytes < distill
    assert stages(teacher, student, micro_batch=4)["distill"].memory_bytes > distill
    more = stages(teacher, student, chunk_tokens=1128)["distill"].memory_bytes - distill
    assert more == 4 * 4 * 1000 * teacher.vocab
    half = planning.Rate(device="test", precision="bf16", flops_per_second=1e12, bytes_per_second=1e10)
    assert stages(teacher, student, rate=half)["teacher"].memory_bytes == 2 * teacher.parameters
    assert f"student with AdamW {size(16 * student.parameters)}" in usual["distill"].note
    assert f"student with AdamW {size(18 * student.parameters)}" in stages(teacher, student, rate=half)["distill"].note
    assert usual["surgery"].memory_bytes == 2 * student.parameters


def test_importance_tries_blocks_only_when_layers_go():
    teacher = shape_of("llama-3.1-8b")
    width = stages(teacher, shape_of("llama-3.1-minitron-4b-width"))["importance"]
    depth = stages(teacher, shape_of("llama-3.1-minitron-4b-depth"))["importance"]
    assert width.flops == 64 * 512 * teacher.flops_per_token(256)
    again = 15 * 8 * 512 * shape_of("llama-3.1-minitron-4b-depth").flops_per_token(256)
    assert depth.flops == width.flops + again
    assert "15 blocks" in depth.note


def test_the_rate_is_measured():
    rate = planning.measure_rate(seconds=0.1)
    assert rate.precision in ("fp32", "bf16")
    assert 1e8 < rate.flops_per_second < 1e16
    assert 1e8 < rate.bytes_per_second < 1e14


def test_no_teacher_is_counted_where_none_is_loaded():
    teacher, student = shape_of("llama-3.1-8b"), shape_of("llama-3.1-minitron-4b-width")
    online = stages(teacher, student)["distill"]
    for changes, row in (({"signal": "topk"}, "cache"), ({"method": "seqkd"}, "answers"), ({"method": "sft"}, None)):
        found = stages(teacher, student, **changes)
        assert online.memory_bytes - found["distill"].memory_bytes >= 4 * teacher.parameters
        assert found["distill"].flops < online.flops
        assert "no teacher" in found["distill"].note
        assert ({"cache", "answers"} & found.keys()) == ({row} if row else set())
        if row:
            assert found[row].memory_bytes > 4 * teacher.parameters
            assert found[row].seconds > 0 < found[row].disk_bytes
    cache = stages(teacher, student, signal="topk")["cache"]
    targets = 1_000_000 + 32 * 512
    assert cache.disk_bytes == targets * (64 * (4 + 2) + 4 + 32 * 4 + 4)  # this vocabulary takes 32 bits
    assert cache.flops == targets * teacher.flops_per_token(256)


def test_a_correction_is_planned_where_it_is_asked_for():
    from compressor import teacher
    from compressor.recipe import Correct

    shape, student = shape_of("llama-3.1-8b"), shape_of("llama-3.1-minitron-4b-width")
    assert "correct" not in stages(shape, student)
    found = {}
    for mode in ("full", "lora", "norms"):
        correct = {"mode": mode, "tokens": 1_000_000, "batch": 16, "micro_batch": 2, "eval_every": 1000}
        asked = build(recipe().model_dump() | {"correct": correct})
        [found[mode]] = [
            stage
            for stage in planning.estimate(asked, teacher=shape, student=student, rate=RATE)
            if stage.name == "correct"
        ]
        tiny = tiny_model()
        counted = planning.trained_parameters(Shape.from_config(tiny.config.to_dict()), Correct(mode=mode))
        model = teacher.MODES[mode](tiny, Correct(mode=mode))
        assert counted == sum(weight.numel() for weight in model.parameters() if weight.requires_grad), mode
    assert found["full"].memory_bytes > 16 * shape.parameters
    assert found["norms"].memory_bytes < found["lora"].memory_bytes < 6 * shape.parameters
    heldout = 2 * 32 * 512 * shape.flops_per_token(256)
    assert (found["full"].flops - heldout) * 2 == (found["lora"].flops - heldout) * 3


def test_answers_of_the_students_own_are_planned():
    teacher, student = shape_of("llama-3.1-8b"), shape_of("llama-3.1-minitron-4b-width")
    assert "rounds" not in stages(teacher, student)
    found = {method: stages(teacher, student, method=method)["rounds"] for method in ("gkd", "minillm")}
    assert found["minillm"].seconds > found["gkd"].seconds > 0  # it draws from the teacher too
    assert found["minillm"].flops > found["gkd"].flops
    assert found["gkd"].note.startswith(f"{round(1_000_000 / 2 / 512 * 0.5 / 4):,} answers")
    judged = 64 * (1 + math.ceil(1_000_000 / 2 / (128 * 512 * 20)))
    assert found["gkd"].note.endswith(f"{judged} to judge it by")


def test_the_steps_of_both_phases_are_planned():
    teacher, student = shape_of("llama-3.1-8b"), shape_of("llama-3.1-minitron-4b-width")
    changes = {"distill": {"method": "gkd", "tokens": 1_000_000, "batch": 2}, "data": {"context": 512}}
    asked = build({"target": "50%", "onpolicy": {"batch": 8, "start_share": 0.25}} | changes)
    [found] = [
        stage
        for stage in planning.estimate(asked, teacher=teacher, student=student, rate=RATE)
        if stage.name == "distill"
    ]
    steps = math.ceil(250_000 / (2 * 512)) + math.ceil(750_000 / (8 * 512))
    assert f"in at least {steps:,} steps" in found.note


def test_a_correction_beside_the_student_is_planned_with_it():
    teacher, student = shape_of("llama-3.1-8b"), shape_of("llama-3.1-minitron-4b-width")

    def found(**correct):
        asked = build({"target": "50%", "correct": correct})
        return {stage.name: stage for stage in planning.estimate(asked, teacher=teacher, student=student, rate=RATE)}

    alone, full, norms = found(), found(mode="full", when="beside"), found(mode="norms", when="beside")
    assert "correct" not in full
    assert "correct" in found(mode="full")
    plain = build({"target": "50%"})
    tokens, forward = plain.distill.tokens, teacher.flops_per_token(plain.data.context / 2)
    assert full["distill"].flops - alone["distill"].flops == 2 * tokens * forward
    assert norms["distill"].flops - alone["distill"].flops == tokens * forward
    states = 16 * teacher.parameters - 4 * teacher.parameters
    assert full["distill"].memory_bytes - alone["distill"].memory_bytes > states
    assert 0 < norms["distill"].memory_bytes - alone["distill"].memory_bytes < states
