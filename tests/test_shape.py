"""Counts against published models and against models that stock transformers builds on the meta device."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_config

from compressor.architecture import PUBLISHED, named_config
from compressor.errors import UserError
from compressor.families import FAMILIES
from compressor.shape import BITS, Shape

# Total parameters as published with the checkpoints (safetensors headers), KV bytes per token at bf16.
COUNTS = {
    "llama-3.1-8b": (8_030_261_248, 131_072),
    "llama-3.1-minitron-4b-width": (4_512_746_496, 131_072),
    "llama-3.1-minitron-4b-depth": (4_540_469_248, 65_536),
    "llama-3.2-1b": (1_235_814_400, 32_768),
    "llama-3.2-3b": (3_212_749_824, 114_688),
    "mistral-7b-v0.1": (7_241_732_096, 131_072),
    "mistral-nemo-12b": (12_247_782_400, 163_840),
    "mn-minitron-8b": (8_414_105_600, 163_840),
    "qwen2.5-0.5b": (494_032_768, 12_288),
    "qwen2.5-7b": (7_615_616_512, 57_344),
    "qwen3-0.6b": (596_049_920, 114_688),
    "qwen3-8b": (8_190_735_360, 147_456),
}


def meta_parameters(config) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def as_config(values):
    from transformers import AutoConfig

    return AutoConfig.for_model(**values)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    parameters, kv_bytes = COUNTS[name]
    shape = Shape.from_config(named_config(name))
    assert shape.parameters == parameters
    assert shape.kv_bytes_per_token() == kv_bytes


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_the_model_that_transformers_builds(name):
    config = as_config(named_config(name))
    shape = Shape.from_config(named_config(name))
    assert shape.parameters == meta_parameters(config)
    assert Shape.from_config(config) == shape


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_counts_for_every_flag(model_type, tied, bias):
    overrides = {"tie_word_embeddings": tied}
    if model_type in ("llama", "qwen3"):
        overrides["attention_bias"] = bias
    if model_type == "llama":
        overrides["mlp_bias"] = bias
    config = tiny_config(model_type, **overrides)
    shape = Shape.from_config(config)
    assert shape.parameters == meta_parameters(config)
    assert shape.embedding_parameters == 259 * 48 * (1 if tied else 2)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_left_out_keys_take_the_defaults_of_the_config_class(model_type):
    values = {
        "model_type": model_type,
        "num_hidden_layers": 2,
        "hidden_size": 640,
        "intermediate_size": 960,
        "num_attention_heads": 64,
        "vocab_size": 100,
    }
    config = as_config(values)
    assert Shape.from_config(values) == Shape.from_config(config)
    assert Shape.from_config(values).parameters == meta_parameters(config)


def test_bytes_at_each_precision():
    shape = Shape.from_config(named_config("llama-3.1-8b"))
    assert shape.nbytes("bf16") == shape.nbytes("fp16") == 16_060_522_496
    assert shape.nbytes("fp32") == 32_121_044_992
    assert shape.nbytes("int8") == 8_030_261_248
    assert shape.nbytes("int4") == 4_015_130_624
    with pytest.raises(UserError, match=r"int3.*int4"):
        shape.nbytes("int3")


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_flops_equal_what_torch_counts(model_type, tied):
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type, tie_word_embeddings=tied)
    tokens = 24
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.zeros(1, tokens, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(ids, use_cache=False)
    # Eager attention multiplies the whole square of queries and keys: every token meets `tokens` keys.
    assert counter.get_total_flops() == tokens * Shape.from_config(config).flops_per_token(tokens)


def test_flops_of_the_8b():
    shape = Shape.from_config(named_config("llama-3.1-8b"))
    matrices = shape.parameters - 128_256 * 4096 - 65 * 4096
    assert shape.flops_per_token() == 2 * matrices
    assert shape.flops_per_token(1000) - shape.flops_per_token() == 4 * 1000 * 4096 * 32


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 0}, "hidden is 0"),
        ({"intermediate_size": -80}, "ffn is -80"),
        ({"vocab_size": "many"}, "vocab is 'many'"),
        ({"num_hidden_layers": True}, "num_layers is True"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"num_key_value_heads": 4}, "6 heads do not share 4 KV heads"),
        ({"hidden_size": 50}, "hidden=50 is not a multiple of the 6 heads.*use 48"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"model_type": "gpt2"}, "'gpt2' is not known"),
    ],
)
def test_impossible_sizes_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        Shape.from_config(tiny_config("llama").to_dict() | change)


def test_missing_sizes_are_named():
    with pytest.raises(UserError, match="num_hidden_layers, hidden_size"):
        Shape.from_config({"model_type": "llama"})


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_student_config_builds_and_counts(model_type):
    from dataclasses import replace

    base = json.loads(tiny_config(model_type, attention_dropout=0.125).to_json_string())
    student = replace(Shape.from_config(base), num_layers=2, hidden=30, ffn=56)
    config = student.to_config(base)
    assert config["head_dim"] == 16
    assert config["attention_dropout"] == 0.125
    assert base["hidden_size"] == 48
    assert Shape.from_config(config) == student
    assert len(config.get("layer_types", [0, 0])) == 2
    assert meta_parameters(as_config(config)) == student.parameters


def test_layer_types_follow_the_kept_layers():
    from dataclasses import replace

    base = named_config("qwen2.5-0.5b") | {
        "use_sliding_window": True,
        "sliding_window": 128,
        "max_window_layers": 20,
    }
    student = replace(Shape.from_config(base), num_layers=3)
    config = student.to_config(base, layers=(0, 19, 20))
    assert config["layer_types"] == ["full_attention", "full_attention", "sliding_attention"]
    assert as_config(config).layer_types == config["layer_types"]
    with pytest.raises(UserError, match="name the kept layers"):
        student.to_config(base)
    with pytest.raises(UserError, match="do not pick 3"):
        student.to_config(base, layers=(0, 1))
    with pytest.raises(UserError, match="do not pick 3"):
        student.to_config(base, layers=(0, 1, 24))


def test_a_config_of_another_family_cannot_express_the_shape():
    with pytest.raises(UserError, match="cannot express family, qkv_bias"):
        Shape.from_config(named_config("qwen2.5-0.5b")).to_config(named_config("llama-3.1-8b"))


SHAPES = st.builds(
    lambda family, layers, group, kv, head_dim, scale, ffn, vocab, tied: Shape(
        family=family,
        num_layers=layers,
        hidden=group * kv * scale,
        ffn=ffn,
        num_heads=group * kv,
        num_kv_heads=kv,
        head_dim=2 * head_dim,
        vocab=vocab,
        tied=tied,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    ),
    family=st.sampled_from(sorted(FAMILIES)),
    layers=st.integers(1, 6),
    group=st.integers(1, 4),
    kv=st.integers(1, 4),
    head_dim=st.integers(1, 16),
    scale=st.integers(1, 8),
    ffn=st.integers(1, 300),
    vocab=st.integers(1, 500),
    tied=st.booleans(),
)


@given(SHAPES)
@settings(max_examples=50, deadline=None)
def test_shapes_survive_json_and_configs(shape):
    assert Shape(**json.loads(json.dumps(shape.to_dict()))) == shape
    config = shape.to_config({"model_type": shape.family})
    assert Shape.from_config(json.loads(json.dumps(config))) == shape
    assert shape.embedding_parameters < shape.parameters
    sizes = [shape.nbytes(precision) for precision in sorted(BITS, key=lambda p: BITS[p])]
    assert sizes == sorted(sizes)


@given(SHAPES)
@settings(max_examples=15, deadline=None)
def test_any_shape_counts_as_transformers_does(shape):
    config = shape.to_config({"model_type": shape.family})
    assert shape.parameters == meta_parameters(as_config(config))
