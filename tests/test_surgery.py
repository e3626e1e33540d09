"""Surgery on tiny real models of every family: what it keeps, it keeps to the bit."""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import save_tiny, tiny_model, tiny_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.checkpoint import DEMO_FOLDER, Checkpoint
from compressor.errors import CheckFailed, UserError
from compressor.scores import Scores
from compressor.shape import Shape
from compressor.surgery import Kept, output_bytes, prune, select, verify

VARIANTS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-biases": ("qwen3", {"attention_bias": True}),
}
IDS = torch.randint(3, 259, (2, 17), generator=torch.Generator().manual_seed(5))


def resized(shape: Shape, **sizes: int) -> Shape:
    return replace(shape, **sizes)


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def cut(folder: Path, out: Path, kept: Kept, shape: Shape | None = None):
    """Prune, verify and reload."""
    source = Checkpoint(folder)
    prune(source, out, kept=kept, shape=shape or source.shape)
    verify(out, shape or source.shape)
    return load(out)


@pytest.fixture(params=VARIANTS, ids=list(VARIANTS))
def teacher(request, tmp_path: Path) -> Path:
    model_type, overrides = VARIANTS[request.param]
    return save_tiny(tmp_path / "teacher", model_type, **overrides)


def test_keep_all_is_bit_identical(teacher: Path, tmp_path: Path) -> None:
    student = cut(teacher, tmp_path / "out", Kept.everything(Checkpoint(teacher).shape))
    assert torch.equal(logits(student), logits(load(teacher)))
    assert json.loads((tmp_path / "out/config.json").read_text())["head_dim"] == 16


def test_permutation_leaves_logits_unchanged(teacher: Path, tmp_path: Path) -> None:
    """Neurons, hidden channels, heads within a group, and whole KV groups may change places."""
    shape, draw = Checkpoint(teacher).shape, random.Random(0)

    def shuffled(ids):
        return tuple(draw.sample(list(ids), len(ids)))

    def heads():
        per = shape.num_heads // shape.num_kv_heads
        groups = shuffled(range(shape.num_kv_heads))
        return tuple(h for g in groups for h in shuffled(range(g * per, (g + 1) * per)))

    kept = Kept(
        layers=tuple(range(shape.num_layers)),
        hidden=shuffled(range(shape.hidden)),
        ffn=tuple(shuffled(range(shape.ffn)) for _ in range(shape.num_layers)),
        heads=tuple(heads() for _ in range(shape.num_layers)),
    )
    assert kept.heads != Kept.everything(shape).heads
    student = cut(teacher, tmp_path / "out", kept)
    assert not torch.equal(student.state_dict()["model.norm.weight"], load(teacher).state_dict()["model.norm.weight"])
    torch.testing.assert_close(logits(student), logits(load(teacher)), rtol=1e-4, atol=1e-4)


def test_student_equals_dense_model_with_neurons_heads_and_layers_masked(teacher: Path, tmp_path: Path) -> None:
    """Removed neurons: zero columns of down_proj; removed heads: zero columns of o_proj; layers: identity.

    Exact up to the order of summation, with biases in place, because nothing is normalised over these axes.
    """
    source = Checkpoint(teacher)
    shape = resized(source.shape, num_layers=2, ffn=56, num_heads=4, hidden=48)
    kept = select(Scores.random(source.shape, seed=3), source.shape, shape)
    assert kept.layers == (0, 2)
    dense = load(teacher)
    with torch.no_grad():
        for j, i in enumerate(kept.layers):
            layer = dense.model.layers[i]
            gone = sorted(set(range(80)) - set(kept.ffn[j]))
            layer.mlp.down_proj.weight[:, gone] = 0
            gone = torch.tensor([h for h in range(6) if h not in kept.heads[j]])
            layer.self_attn.o_proj.weight.unflatten(1, (6, 16))[:, gone] = 0
        removed = dense.model.layers[1]
        for linear in (removed.self_attn.o_proj, removed.mlp.down_proj):
            linear.weight.zero_()
            if linear.bias is not None:
                linear.bias.zero_()
    student = cut(teacher, tmp_path / "out", kept, shape)
    torch.testing.assert_close(logits(student), logits(dense), rtol=1e-4, atol=1e-4)
    # the mask is what makes them equal: the untouched teacher differs
    assert not torch.allclose(logits(student), logits(load(teacher)), rtol=1e-2, atol=1e-2)


NORMS = ("input_layernorm", "post_attention_layernorm", "model.norm")


def test_hidden_slicing_equals_masking_once_the_norms_are_rescaled(teacher: Path, tmp_path: Path) -> None:
    """Dense model in which removed channels are zero in the embedding and written by nothing.

    With h of H channels, mean(x^2) over h is H / h times that over H. So the identity holds exactly when the
    student's norm weights carry sqrt(H / h), and the dense eps is h / H of the student's; not without.
    """
    source = Checkpoint(teacher)
    shape = resized(source.shape, hidden=36)
    kept = select(Scores.random(source.shape, seed=4), source.shape, shape)
    gone = sorted(set(range(48)) - set(kept.hidden))
    dense, student = load(teacher), cut(teacher, tmp_path / "out", kept, shape)
    plain = logits(student)
    with torch.no_grad():
        dense.model.embed_tokens.weight[:, gone] = 0
        for layer in dense.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight[gone] = 0
                if linear.bias is not None:
                    linear.bias[gone] = 0
        for name, module in dense.named_modules():
            if name.endswith(NORMS):
                module.variance_epsilon *= 36 / 48
        for name, module in student.named_modules():
            if name.endswith(NORMS):
                module.weight.mul_((48 / 36) ** 0.5)
    torch.testing.assert_close(logits(student), logits(dense), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, logits(dense), rtol=1e-2, atol=1e-2)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_tensor_is_index_selection_to_the_bit(tmp_path_factory, data) -> None:
    """Any kept ids, any sharding, bf16: each student tensor equals plain indexing of the teacher's."""
    folder = tmp_path_factory.mktemp("property")
    biases = data.draw(st.booleans())
    model = tiny_model("llama", attention_bias=biases, mlp_bias=biases).bfloat16()
    model.save_pretrained(folder / "teacher", max_shard_size=data.draw(st.sampled_from(["20KB", "60KB", "1GB"])))
    full = dict(model.state_dict())
    source = Checkpoint(folder / "teacher")
    shape = resized(
        source.shape,
        num_layers=data.draw(st.sampled_from([2, 3])),
        hidden=data.draw(st.sampled_from([6, 24, 42, 48])),
        ffn=data.draw(st.integers(1, 80)),
        num_heads=data.draw(st.sampled_from([2, 6])),
    )
    kept = select(Scores.random(source.shape, seed=data.draw(st.integers(0, 99))), source.shape, shape)
    seen: list[int] = []
    limit = data.draw(st.sampled_from([9_000, 10**9]))
    prune(source, folder / "out", kept=kept, shape=shape, max_shard_bytes=limit, progress=seen.append)
    assert sum(seen) == output_bytes(source, kept=kept, shape=shape) == 2 * shape.parameters
    student = load(folder / "out").state_dict()

    def rows(heads):
        return torch.tensor([h * 16 + d for h in heads for d in range(16)])

    hidden = torch.tensor(kept.hidden)
    for j, i in enumerate(kept.layers):
        new, old = f"model.layers.{j}.", f"model.layers.{i}."
        ffn, heads = torch.tensor(kept.ffn[j]), rows(kept.heads[j])
        for name, ids in (("mlp.gate_proj", ffn), ("mlp.up_proj", ffn), ("self_attn.q_proj", heads)):
            assert torch.equal(student[f"{new}{name}.weight"], full[f"{old}{name}.weight"][ids][:, hidden])
            if biases:
                assert torch.equal(student[f"{new}{name}.bias"], full[f"{old}{name}.bias"][ids])
        for name, ids in (("mlp.down_proj", ffn), ("self_attn.o_proj", heads)):
            assert torch.equal(student[f"{new}{name}.weight"], full[f"{old}{name}.weight"][hidden][:, ids])
            if biases:
                assert torch.equal(student[f"{new}{name}.bias"], full[f"{old}{name}.bias"][hidden])
        for name in ("self_attn.k_proj", "self_attn.v_proj"):
            assert torch.equal(student[f"{new}{name}.weight"], full[f"{old}{name}.weight"][:, hidden])
        for name in ("input_layernorm", "post_attention_layernorm"):
            assert torch.equal(student[f"{new}{name}.weight"], full[f"{old}{name}.weight"][hidden])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(student[name], full[name][:, hidden])
    assert torch.equal(student["model.norm.weight"], full["model.norm.weight"][hidden])
    assert all(value.dtype == torch.bfloat16 for value in student.values())


def test_small_chunks_give_the_same_bytes(tmp_path: Path, monkeypatch) -> None:
    """Rows are streamed: a chunk of a few rows, and a row longer than a chunk, change nothing."""
    source = Checkpoint(save_tiny(tmp_path / "teacher"))
    shape = resized(source.shape, hidden=42, ffn=33)
    kept = select(Scores.random(source.shape, seed=1), source.shape, shape)
    whole = None
    for size in (4 * 2**20, 500, 1):
        monkeypatch.setattr("compressor.surgery.CHUNK_BYTES", size)
        prune(source, tmp_path / str(size), kept=kept, shape=shape)
        data = (tmp_path / str(size) / "model.safetensors").read_bytes()
        assert whole is None or data == whole
        whole = data


def test_select_ranks_per_layer_and_within_kv_groups() -> None:
    teacher = Shape(family="llama", num_layers=3, hidden=8, ffn=4, num_heads=4, num_kv_heads=2, head_dim=4, vocab=9)
    scores = Scores(
        hidden=torch.tensor([0.0, 9, 1, 8, 2, 7, 3, 6]),
        ffn=torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1], [1, 1, 1, 1]]),
        heads=torch.tensor([[9.0, 8, 1, 2], [1, 2, 3, 4], [5, 1, 1, 5]]),
        layers=torch.tensor([1.0, 0.5, 2.0]),
    )
    student = resized(teacher, hidden=4, ffn=2, num_heads=2)
    kept = select(scores, teacher, student)
    assert kept.layers == (0, 1, 2)
    assert kept.hidden == (1, 3, 5, 7)
    assert kept.ffn == ((2, 3), (0, 1), (0, 1))
    assert kept.heads == ((0, 3), (1, 3), (0, 3))  # head 1 scores 8 but head 0 is its group's best
    fewer = select(scores, teacher, resized(teacher, num_heads=2, num_kv_heads=1))
    assert fewer.heads == ((0, 1), (2, 3), (0, 1))


def test_multi_head_attention_loses_kv_heads_with_its_heads(tmp_path: Path) -> None:
    """One query head per KV head: dropping it drops its keys and values too, as masking it does."""
    folder = save_tiny(tmp_path / "teacher", num_key_value_heads=6)
    source = Checkpoint(folder)
    shape = resized(source.shape, num_heads=4, num_kv_heads=4)
    kept = select(Scores.random(source.shape, seed=2), source.shape, shape)
    dense = load(folder)
    with torch.no_grad():
        for layer, heads in zip(dense.model.layers, kept.heads, strict=True):
            gone = torch.tensor([h for h in range(6) if h not in heads])
            layer.self_attn.o_proj.weight.unflatten(1, (6, 16))[:, gone] = 0
    student = cut(folder, tmp_path / "out", kept, shape)
    torch.testing.assert_close(logits(student), logits(dense), rtol=1e-4, atol=1e-4)


def test_depth_drops_one_contiguous_block_by_removal_loss_then_block_influence() -> None:
    teacher = Shape(family="llama", num_layers=6, hidden=8, ffn=4, num_heads=4, num_kv_heads=2, head_dim=4, vocab=9)
    scores, student = Scores.random(teacher), resized(teacher, num_layers=4)
    scores.layers = torch.tensor([0.0, 5, 5, 1, 1, 0])
    assert select(scores, teacher, student).layers == (0, 1, 2, 5)
    scores.blocks = {2: torch.tensor([0.0, 9, 1, 9, 0])}  # the ends are not candidates
    assert select(scores, teacher, student).layers == (0, 1, 4, 5)
    scores.removal = {(1, 3): 2.0, (2, 4): 3.0}  # (3, 5) was not measured: not comparable
    assert select(scores, teacher, student).layers == (0, 1, 4, 5)
    scores.removal |= {(3, 5): 2.5}
    assert select(scores, teacher, student).layers == (0, 3, 4, 5)
    with pytest.raises(UserError, match="at least 2"):
        select(scores, teacher, resized(teacher, num_layers=1))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden": 60}, "teacher only 48"),
        ({"head_dim": 8}, "head_dim"),
        ({"tied": True}, "tied"),
        ({"num_heads": 4, "num_kv_heads": 1}, "larger groups"),
    ],
)
def test_select_refuses_a_student_that_is_no_part_of_the_teacher(sizes, message) -> None:
    teacher = Shape(
        family="llama", num_layers=3, hidden=48, ffn=80, num_heads=6, num_kv_heads=2, head_dim=16, vocab=259
    )
    with pytest.raises(UserError, match=message):
        select(Scores.random(teacher), teacher, resized(teacher, **sizes))
    with pytest.raises(UserError, match="measure them again"):
        select(Scores.random(resized(teacher, ffn=8)), teacher, teacher)


def test_config_generation_config_and_tokenizer_travel(tmp_path: Path) -> None:
    """Rope stays, per-layer entries follow the kept layers, chat template and generation config too."""
    folder = save_tiny(
        tmp_path / "teacher",
        "qwen2",
        num_hidden_layers=5,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=3,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7], "top_p": 0.8}))
    source = Checkpoint(folder)
    source.config["auto_map"] = {"AutoModel": "elsewhere--modeling.Model"}
    shape = resized(source.shape, num_layers=3)
    scores = Scores.random(source.shape)
    scores.removal = {(1, 3): 1.0, (2, 4): 2.0}
    student = cut_from(source, tmp_path / "out", scores, shape)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    assert config["max_window_layers"] == 1
    assert config["rope_parameters"] == source.config["rope_parameters"]
    assert "auto_map" not in config
    assert student.generation_config.eos_token_id == [1, 7]
    tokenizer, before = AutoTokenizer.from_pretrained(tmp_path / "out"), tiny_tokenizer()
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == before.apply_chat_template(chat, tokenize=False)
    assert tokenizer.encode("some text") == before.encode("some text")


def cut_from(source: Checkpoint, out: Path, scores: Scores, shape: Shape):
    prune(source, out, kept=select(scores, source.shape, shape), shape=shape)
    verify(out, shape)
    return load(out)


def rewritten(folder: Path, change) -> Path:
    """The folder with its tensors changed by `change(dict)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def keep_all(folder: Path, out: Path) -> None:
    source = Checkpoint(folder)
    prune(source, out, kept=Kept.everything(source.shape), shape=source.shape)


def test_rotary_buffers_of_old_checkpoints_are_dropped(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = rewritten(save_tiny(tmp_path / "teacher"), lambda t: t.update({name: torch.ones(8)}))
    keep_all(folder, tmp_path / "out")
    verify(tmp_path / "out", Checkpoint(folder).shape)
    assert name not in Checkpoint(tmp_path / "out").names


def test_tied_head_that_was_saved_anyway_must_equal_the_embedding(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "teacher", tie_word_embeddings=True)
    same = rewritten(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    keep_all(same, tmp_path / "out")
    assert "lm_head.weight" not in Checkpoint(tmp_path / "out").names
    other = rewritten(folder, lambda t: t["lm_head.weight"][-1].add_(1))
    with pytest.raises(UserError, match="differs from its embedding"):
        keep_all(other, tmp_path / "other")
    assert not (tmp_path / "other").exists()


BROKEN = {
    "unknown": (lambda t: t.update({"model.layers.0.adapter.weight": torch.ones(2)}), "adapter"),
    "missing": (
        lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
        r"no tensor model\.layers\.1\.mlp\.up_proj",
    ),
    "size": (lambda t: t.update({"model.norm.weight": torch.ones(47)}), "config.json says"),
    "integers": (lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}), "I8"),
    "nan": (
        lambda t: t["model.layers.2.mlp.down_proj.weight"][7].fill_(float("nan")),
        r"layers\.2\.mlp\.down_proj",
    ),
    "infinite": (lambda t: t["lm_head.weight"][258].fill_(float("-inf")), r"lm_head\.weight"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_bad_tensors_are_named_and_nothing_is_left(what, tmp_path: Path) -> None:
    change, message = BROKEN[what]
    folder = rewritten(save_tiny(tmp_path / "teacher"), change)
    with pytest.raises(UserError, match=message) as caught:
        keep_all(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_full_disk_is_one_line_and_nothing_is_left(tmp_path: Path, monkeypatch) -> None:
    """A real refused write: the process may not write files of more than 100 kB."""
    import resource

    folder = save_tiny(tmp_path / "teacher")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="the disk is full") as caught:
            keep_all(folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"0\.0 GB free"):
        keep_all(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    source = Checkpoint(save_tiny(tmp_path / "teacher"))

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(
            source,
            tmp_path / "out",
            kept=Kept.everything(source.shape),
            shape=source.shape,
            progress=interrupt,
        )
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_not_touched(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "teacher")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(UserError, match="not empty"):
        keep_all(folder, folder)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_verify_fails_on_missing_keys_and_on_infinite_logits(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "teacher")
    shape = Checkpoint(folder).shape
    verify(folder, shape)
    with pytest.raises(CheckFailed, match="parameters"):
        verify(folder, resized(shape, ffn=79))
    rewritten(folder, lambda t: t["model.norm.weight"].fill_(float("inf")))
    with pytest.raises(CheckFailed, match="finite"):
        verify(folder, shape)
    rewritten(folder, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckFailed, match="missing keys"):
        verify(folder, shape)


def test_a_trained_checkpoint(tmp_path: Path) -> None:
    """The embedded teacher (tied, GQA) cut in every axis; and by keep-all, to the bit."""
    folder = DEMO_FOLDER
    source = Checkpoint(folder)
    keep_all(folder, tmp_path / "same")
    verify(tmp_path / "same", source.shape)
    with safe_open(tmp_path / "same/model.safetensors", "pt") as after:
        assert all(torch.equal(after.get_tensor(name), source.tensor(name)) for name in after.keys())  # noqa: SIM118
    shape = resized(source.shape, hidden=48, ffn=128, num_layers=4)
    student = cut_from(source, tmp_path / "small", Scores.random(source.shape), shape)
    assert sum(p.numel() for p in student.parameters()) == shape.parameters
