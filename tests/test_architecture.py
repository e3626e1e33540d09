"""Targets: strict to read, met within 5 %, at sizes that block quantizers can hold."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from math import log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.architecture import PUBLISHED, Target, choose, named_config, parse_target
from compressor.errors import UserError
from compressor.shape import Shape

WIDTH_FIELDS = ("hidden", "ffn")


def shape_of(name: str) -> Shape:
    return Shape.from_config(named_config(name))


def small(**sizes) -> Shape:
    usual = {"num_layers": 6, "hidden": 256, "ffn": 704, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32}
    return Shape(**({"family": "llama", "vocab": 2048, "tied": True} | usual | sizes))


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("4b", Target("4b", "parameters", amount=4e9)),
        ("350M", Target("350M", "parameters", amount=350e6)),
        (" 1.5b ", Target("1.5b", "parameters", amount=1.5e9)),
        ("200k", Target("200k", "parameters", amount=200e3)),
        ("50%", Target("50%", "fraction", amount=0.5)),
        ("12.5%", Target("12.5%", "fraction", amount=0.125)),
        ("2GiB@int4", Target("2GiB@int4", "bytes", amount=2**31, precision="int4")),
        ("700MB@bf16", Target("700MB@bf16", "bytes", amount=700e6, precision="bf16")),
        ("layers=16", Target("layers=16", "sizes", sizes=(("num_layers", 16),))),
        (
            "layers=24, hidden=3072,ffn=9216",
            Target(
                "layers=24, hidden=3072,ffn=9216",
                "sizes",
                sizes=(("num_layers", 24), ("hidden", 3072), ("ffn", 9216)),
            ),
        ),
        (
            "llama-3.1-minitron-4b-width",
            Target("llama-3.1-minitron-4b-width", "named", name="llama-3.1-minitron-4b-width"),
        ),
    ],
)
def test_accepted_forms(text, target):
    assert parse_target(text) == target


REFUSED = (
    *("", "4", "b", "-4b", "4e9", "4 b", "0b", "0%", "100%", "150%", "50", "0.5", "4gb", "2GiB", "2GiB@int3"),
    *("0GiB@int4", "layers", "nan%", "inf", "\u0664b", "llama"),
)


@pytest.mark.parametrize("text", REFUSED)
def test_other_forms_are_refused_with_the_accepted_ones(text):
    with pytest.raises(UserError, match="not understood; expected 4b or 350m"):
        parse_target(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hidden=0", "hidden='0'"),
        ("hidden=1.5", r"hidden='1\.5'"),
        ("hidden=", "hidden=''"),
        ("hidden=64,hidden=96", "hidden twice"),
        ("4b,layers=2", "sets '4b'"),
        ("kv_heads=4", "KV heads, head_dim and the vocabulary stay"),
        ("head_dim=64", "KV heads, head_dim and the vocabulary stay"),
        ("llama-3.1-minitron-4b-wdth", "did you mean llama-3.1-minitron-4b-width"),
    ],
)
def test_what_is_wrong_is_named(text, says):
    with pytest.raises(UserError, match=says):
        parse_target(text)


@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_text_parses_or_says_why(text):
    target, problem = None, ""
    try:
        target = parse_target(text)
    except UserError as error:
        problem = str(error)
    assert (target is None) == bool(problem)
    assert "\n" not in problem


def test_4b_of_the_8b_is_within_five_percent_of_the_total():
    teacher = shape_of("llama-3.1-8b")
    student = choose(parse_target("4b"), teacher)
    assert abs(student.parameters / 4.0e9 - 1) <= 0.05
    assert student.hidden % 256 == student.ffn % 256 == 0
    assert student.hidden < teacher.hidden
    assert student.ffn < teacher.ffn
    assert replace(student, hidden=teacher.hidden, ffn=teacher.ffn) == teacher
    assert student.ffn / student.hidden == pytest.approx(teacher.ffn / teacher.hidden, rel=0.1)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "mistral-7b-v0.1", "qwen2.5-7b"])
def test_the_nearest_ratio_and_count_on_the_grid_is_chosen(name):
    teacher = shape_of(name)

    def distance(shape: Shape) -> float:
        ratio = (shape.ffn / shape.hidden) / (teacher.ffn / teacher.hidden)
        return abs(log(ratio)) + abs(shape.parameters / 4e9 - 1)

    heads = teacher.num_heads if teacher.family == "llama" else 1
    grid = product(range(256, teacher.hidden + 1, 256), range(256, teacher.ffn + 1, 256))
    shapes = [replace(teacher, hidden=hidden, ffn=ffn) for hidden, ffn in grid if hidden % heads == 0]
    met = [shape for shape in shapes if abs(shape.parameters / 4e9 - 1) <= 0.05]
    assert distance(choose(parse_target("4b"), teacher)) == pytest.approx(min(map(distance, met)), abs=0.01)


def test_published_shapes_by_name():
    teacher = shape_of("llama-3.1-8b")
    assert choose(parse_target("llama-3.1-minitron-4b-width"), teacher).parameters == 4_512_746_496
    depth = choose(parse_target("llama-3.1-minitron-4b-depth"), teacher)
    assert depth.parameters == 4_540_469_248
    assert choose(parse_target("layers=16"), teacher) == depth
    assert choose(parse_target("hidden=3072,ffn=9216"), teacher).parameters == 4_512_746_496
    assert choose(parse_target("mn-minitron-8b"), shape_of("mistral-nemo-12b")).ffn == 11_520


def test_a_bytes_target_is_a_budget():
    for name in ("llama-3.1-8b", "mistral-nemo-12b", "qwen2.5-7b"):
        student = choose(parse_target("2GiB@int4"), shape_of(name))
        assert 0.95 * 2**31 <= student.nbytes("int4") <= 2**31


def test_explicit_sizes_combine():
    student = choose(parse_target("layers=24,hidden=2048,heads=16"), shape_of("llama-3.1-8b"))
    assert (student.num_layers, student.hidden, student.ffn) == (24, 2048, 14336)
    assert (student.num_heads, student.num_kv_heads, student.head_dim) == (16, 8, 128)


@pytest.mark.parametrize(
    ("text", "teacher", "says"),
    [
        ("4b", "llama-3.2-1b", "smaller than the teacher"),
        ("2GiB@int4", "llama-3.2-1b", "smaller than the teacher"),
        ("layers=40", "llama-3.1-8b", "the teacher has 32"),
        ("layers=1", "llama-3.1-8b", "first and the last layer"),
        ("layers=32", "llama-3.1-8b", "is the teacher itself"),
        ("llama-3.1-8b", "llama-3.1-8b", "is the teacher itself"),
        ("llama-3.1-8b", "llama-3.1-minitron-4b-width", "teacher is smaller"),
        ("qwen3-0.6b", "llama-3.1-8b", "family=qwen3"),
        ("llama-3.2-1b", "llama-3.1-8b", "head_dim=64"),
        ("heads=20", "llama-3.1-8b", "20 heads do not share 8 KV heads"),
        ("hidden=3000", "llama-3.1-8b", "use 2976 or 3008"),
        ("ffn=9200", "llama-3.1-8b", "use 9184 or 9216"),
        ("hidden=1024", "llama-3.2-3b", "multiple of 96.*use 960 or 1056"),
        ("100k", "llama-3.1-8b", "no width of the teacher meets"),
    ],
)
def test_out_of_reach_targets_say_why(text, teacher, says):
    with pytest.raises(UserError, match=says) as caught:
        choose(parse_target(text), shape_of(teacher))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PUBLISHED)
@given(percent=st.integers(10, 97))
@settings(max_examples=12, deadline=None)
def test_a_share_of_any_published_model(name, percent):
    teacher = shape_of(name)
    student = choose(parse_target(f"{percent}%"), teacher)
    assert abs(student.parameters / (percent / 100 * teacher.parameters) - 1) <= 0.05
    assert student.hidden % 32 == student.ffn % 32 == 0
    assert student.hidden <= teacher.hidden
    assert student.ffn <= teacher.ffn
    assert replace(student, hidden=teacher.hidden, ffn=teacher.ffn) == teacher


TEACHERS = st.builds(
    lambda family, heads, scale, ffn, layers, tied: small(
        family=family,
        num_heads=heads,
        num_kv_heads=2,
        head_dim=16,
        hidden=heads * scale * (4 if family == "llama" else 3),
        ffn=ffn,
        num_layers=layers,
        tied=tied,
        vocab=300,
    ),
    family=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    heads=st.sampled_from([2, 4, 6, 8]),
    scale=st.integers(4, 20),
    ffn=st.integers(40, 900),
    layers=st.integers(1, 4),
    tied=st.booleans(),
)


@given(TEACHERS, st.integers(30, 95))
@settings(max_examples=60, deadline=None)
def test_no_width_breaks_block_quantization_when_an_aligned_one_exists(teacher, percent):
    wanted = percent / 100 * teacher.parameters
    aligned = []
    for hidden, ffn in product(range(32, teacher.hidden + 1, 32), range(32, teacher.ffn + 1, 32)):
        if teacher.family == "llama" and hidden % teacher.num_heads:
            continue
        shape = replace(teacher, hidden=hidden, ffn=ffn)
        if shape != teacher and 0.95 * wanted <= shape.parameters <= 1.05 * wanted:
            aligned.append(shape)
    try:
        student = choose(parse_target(f"{percent}%"), teacher)
    except UserError:
        student = None
    if student is None:
        assert not aligned
        return
    assert 0.95 * wanted <= student.parameters <= 1.05 * wanted
    assert (student.hidden % 32 == student.ffn % 32 == 0) == bool(aligned)


def test_coarse_steps_where_the_model_is_large_enough_and_finer_ones_below():
    large = choose(parse_target("50%"), small(hidden=4096, ffn=14336, num_heads=32, head_dim=128))
    assert large.hidden % 256 == large.ffn % 256 == 0
    middle = choose(parse_target("50%"), shape_of("qwen2.5-0.5b"))
    assert middle.hidden % 64 == middle.ffn % 64 == 0
    assert middle.hidden % 256
    demo = choose(parse_target("50%"), small())
    assert demo.hidden % 32 == demo.ffn % 32 == 0
    tiny = choose(parse_target("50%"), small(hidden=24, ffn=40, head_dim=8, vocab=259))
    assert tiny.hidden % 32
    assert abs(tiny.parameters / small(hidden=24, ffn=40, head_dim=8, vocab=259).parameters - 0.5) <= 0.025


def test_shipped_names():
    assert named_config("Llama-3.1-8B") == named_config("llama-3.1-8b")
    with pytest.raises(UserError, match="did you mean qwen3-8b"):
        named_config("qwen3-8")
    for name in PUBLISHED:
        assert json.dumps(named_config(name))


def test_shapes_and_targets_need_no_heavy_import():
    code = (
        "import sys; import compressor.plan; "
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'datasets', 'rich'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
