"""The table against what stock transformers builds: same names, same order-free set, same dimensions."""

import pytest
from models import tiny_config, tiny_model

from compressor import families
from compressor.errors import UserError
from compressor.shape import Shape

VARIANTS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("mistral", {}),
    ("mistral", {"tie_word_embeddings": True}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
]


@pytest.mark.parametrize(("model_type", "overrides"), VARIANTS)
def test_table_names_every_tensor_with_its_dimensions(model_type, overrides):
    model = tiny_model(model_type, **overrides)
    shape = Shape.from_config(model.config)
    stored = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if shape.tied:
        stored.pop("lm_head.weight", None)
    table = {name: tuple(map(shape.size, axes)) for name, axes in families.tensors(shape)}
    assert table == stored
    assert all(families.axes_of(shape, name) == axes for name, axes in families.tensors(shape))
    assert not any(families.droppable(shape, name) for name in table)
    # Every matrix has two different sizes, so the comparison above notices swapped axes.
    assert all(len(set(sizes)) == len(sizes) for sizes in stored.values())


def test_tensors_come_in_the_order_of_the_model():
    shape = Shape.from_config(tiny_config("llama"))
    names = [name for name, _ in families.tensors(shape)]
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(name.split(".")[2]) for name in names[1:-2]]
    assert layers == sorted(layers)
    assert set(layers) == {0, 1, 2}
    assert len(names) == len(set(names)) == 3 + 3 * 9


def test_unknown_model_type_lists_the_rows():
    with pytest.raises(UserError, match=r"'gpt2'.*llama, mistral, qwen2, qwen3"):
        families.family("gpt2")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.layers.0.self_attn.qkv_proj.weight", "not part of a llama model"),
        ("model.layers.x.mlp.up_proj.weight", "not part of a llama model"),
        ("transformer.wte.weight", "not part of a llama model"),
        ("model.layers.3.mlp.up_proj.weight", "layer 3 but config.json says 3 layers"),
        ("model.layers.0.self_attn.q_proj.bias", "only with qkv_bias"),
        ("model.layers.0.self_attn.q_norm.weight", "only with qk_norm"),
    ],
)
def test_a_tensor_that_no_pattern_covers_is_an_error(name, says):
    shape = Shape.from_config(tiny_config("llama"))
    with pytest.raises(UserError, match=says):
        families.axes_of(shape, name)
    assert not families.droppable(shape, name)


def test_old_rotary_buffers_and_a_saved_tied_head_can_be_dropped():
    tied = Shape.from_config(tiny_config("llama", tie_word_embeddings=True))
    untied = Shape.from_config(tiny_config("llama"))
    assert families.droppable(untied, "model.layers.11.self_attn.rotary_emb.inv_freq")
    assert families.droppable(untied, "model.rotary_emb.inv_freq")
    assert families.droppable(tied, "lm_head.weight")
    assert not families.droppable(untied, "lm_head.weight")
