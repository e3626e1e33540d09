"""Recipes: strict, printable, and every number derived from one dial unless it is set."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor import recipe as recipes
from compressor.errors import UserError
from compressor.shape import Shape

TEACHER = Shape("llama", 32, 4096, 14336, 32, 8, 128, 128256, False)
STUDENT = Shape("llama", 32, 3072, 9216, 32, 8, 128, 128256, False)


def resolved(values: dict, *, student: Shape = STUDENT, max_positions: int = 8192) -> recipes.Recipe:
    recipe = recipes.build({"target": "4b"} | values)
    return recipes.resolve(recipe, teacher=TEACHER, student=student, max_positions=max_positions)


def test_an_unknown_key_names_the_nearest_valid_one():
    with pytest.raises(UserError, match=r"unknown key `distill.tokns`.*`distill.tokens`"):
        recipes.build({"target": "4b", "distill": {"tokns": 3}})
    with pytest.raises(UserError, match=r"unknown key `taget`.*`target`"):
        recipes.build({"taget": "4b"})


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("distill", "tokens", 0),
        ("distill", "lr", float("nan")),
        ("distill", "precision", "int3"),
        ("importance", "batch", "median"),
        ("data", "heldout_fraction", 0.9),
        ("evaluate", "prompts", "many"),
    ],
)
def test_a_bad_value_is_named_in_one_line(section, key, value):
    with pytest.raises(UserError, match=f"`{section}.{key}`") as caught:
        recipes.build({"target": "4b", section: {key: value}})
    assert "\n" not in str(caught.value)


def test_a_missing_target_is_said():
    with pytest.raises(UserError, match="`target` is missing"):
        recipes.build({})


def test_one_dial_derives_the_rest():
    recipe = resolved({})
    assert recipe.distill.tokens == STUDENT.parameters // 2
    assert recipe.distill.lr == pytest.approx(1e-4 * 4096 / 3072, rel=1e-2)
    assert recipe.distill.min_lr == pytest.approx(recipe.distill.lr / 10)
    assert recipe.distill.batch % recipe.distill.micro_batch == 0
    assert recipe.data.context == 4096


def test_what_is_set_by_hand_stays():
    recipe = resolved({"distill": {"tokens": 5_000_000, "lr": 3e-4, "micro_batch": 2, "batch": 10}})
    assert (recipe.distill.tokens, recipe.distill.lr) == (5_000_000, 3e-4)
    assert (recipe.distill.micro_batch, recipe.distill.batch) == (2, 10)
    assert recipe.distill.min_lr == pytest.approx(3e-5)


def test_the_context_never_exceeds_the_positions_of_the_teacher():
    assert resolved({}, max_positions=512).data.context == 512


def test_yaml_round_trip_of_a_resolved_recipe():
    recipe = resolved({"seed": 3})
    assert recipes.build(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("name", ["demo", "llama-3.1-minitron-4b-width", "llama-3.1-minitron-4b-depth"])
def test_shipped_recipes_are_valid(name):
    values = recipes.load_values(name)
    recipe = recipes.build(values)
    assert {"teacher", "target"} <= set(values)
    assert recipe.distill.batch % recipe.distill.micro_batch == 0


def test_a_missing_recipe_lists_the_shipped_ones():
    with pytest.raises(UserError, match=r"no recipe nowhere.yaml.*demo"):
        recipes.load_values("nowhere.yaml")


def test_broken_yaml_is_one_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("target: [1,\n  2")
    with pytest.raises(UserError, match="is not YAML") as caught:
        recipes.load_values(str(path))
    assert "\n" not in str(caught.value)


def test_numbers_are_read_as_people_write_them():
    values: dict = {}
    for text in ("distill.lr=2e-3", "distill.tokens=2e9", "target=50%", "data.source=a=b.txt", "teacher=nan"):
        recipes.set_value(values, text)
    recipe = recipes.build(values)
    assert (recipe.distill.lr, recipe.distill.tokens) == (2e-3, 2_000_000_000)
    assert (recipe.target, recipe.data.source, recipe.teacher) == ("50%", "a=b.txt", "nan")


@pytest.mark.parametrize(
    ("key", "value"),
    [("tokens", "12"), ("tokens", 1.5), ("batch", True), ("lr", "fast"), ("gradient_checkpointing", 1)],
)
def test_values_of_another_type_are_refused_not_coerced(key, value):
    with pytest.raises(UserError, match=f"distill.{key}"):
        recipes.build({"target": "50%", "distill": {key: value}})


@pytest.mark.parametrize("text", ["distill.lr", "target.x.y=1"])
def test_set_refuses_what_is_no_assignment(text):
    with pytest.raises(UserError, match="--set"):
        recipes.set_value({"target": "4b"}, text)


def test_differences_are_dotted_keys():
    assert recipes.differences(resolved({}), resolved({"seed": 1, "distill": {"lr": 1e-3}})) == [
        "seed",
        "distill.lr",
        "distill.min_lr",
    ]


def test_merging_lays_one_recipe_over_another():
    base, over = {"a": 1, "distill": {"lr": 1, "batch": 2}}, {"distill": {"lr": 3}, "b": 4}
    assert recipes.merged(base, over) == {"a": 1, "b": 4, "distill": {"lr": 3, "batch": 2}}
    assert base == {"a": 1, "distill": {"lr": 1, "batch": 2}}


@settings(deadline=None)
@given(
    hidden=st.integers(1, 64).map(lambda n: 64 * n),
    layers=st.integers(1, 80),
    positions=st.sampled_from([128, 512, 2048, 131072]),
    rows=st.integers(1, 2000),
)
def test_any_resolved_recipe_can_run(hidden, layers, positions, rows):
    shape = Shape("llama", layers, hidden, 4 * hidden, 8, 8, 64, 32000, False)
    recipe = recipes.build({"target": "50%", "distill": {"batch": rows}})
    chosen = recipes.resolve(recipe, teacher=shape, student=shape, max_positions=positions).distill
    assert chosen.batch == rows
    assert rows % chosen.micro_batch == 0
    assert 0 < chosen.min_lr < chosen.lr <= 2e-3
    assert chosen.eval_every >= 1
    assert chosen.warmup_steps < max(1, chosen.tokens // (rows * min(4096, positions))) or chosen.warmup_steps == 0


def test_what_resolve_fills_is_what_plan_shows():
    shape = Shape("llama", 4, 256, 1024, 8, 8, 64, 32000, False)
    recipe = recipes.build({"target": "50%"})
    resolved = recipes.resolve(recipe, teacher=shape, student=shape, max_positions=512)
    assert set(recipes.differences(recipe, resolved)) <= set(recipes.derived(resolved))
    assert recipes.derived(resolved)["data.context"] == 512


def test_a_context_beyond_the_teachers_positions_is_refused():
    shape = Shape("llama", 4, 256, 1024, 8, 8, 64, 32000, False)
    recipe = recipes.build({"target": "50%", "data": {"context": 1024}})
    with pytest.raises(UserError, match=r"data\.context is 1024, but the teacher knows 512 positions"):
        recipes.resolve(recipe, teacher=shape, student=shape, max_positions=512)


def test_a_rate_does_not_end_above_its_peak():
    with pytest.raises(UserError, match=r"distill\.min_lr is 1\.0; expected at most distill\.lr"):
        resolved({"distill": {"min_lr": 1.0}})
    with pytest.raises(UserError, match=r"correct\.min_lr is 1\.0; expected at most correct\.lr"):
        resolved({"correct": {"mode": "full", "min_lr": 1.0}})
    beside = {"mode": "full", "when": "beside", "lr": 1e-6}  # whose rate ends as distill's does
    assert resolved({"correct": beside}).correct.lr == 1e-6


def test_answers_leave_room_for_a_prompt():
    short = resolved({"data": {"context": 100}, "align": {"stages": ["dpo"]}, "evaluate": {"max_new_tokens": 90}})
    assert (short.distill.max_new_tokens, short.align.max_new_tokens, short.evaluate.max_new_tokens) == (50, 50, 90)
    assert resolved({}).distill.max_new_tokens == 256
    assert resolved({}).evaluate.max_new_tokens == 128
