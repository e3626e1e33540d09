"""Export: every format holds the student, and an artifact that does not is caught and not kept."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy
import pytest
import torch
from models import CHAT_TEMPLATE, save_tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import export
from compressor.checkpoint import DEMO_FOLDER, Checkpoint
from compressor.demo import tasks
from compressor.errors import CheckFailed, UserError
from compressor.evaluate.skills import SKILLS
from compressor.runtime import LlamaCppRuntime, OnnxRuntime, Runtime, load
from compressor.surgery import Kept, prune
from export import Settings, formats, gguf_tokenizer, gptq, k_quants, read_back, to_bitsandbytes, to_gguf, to_onnx
from export.formats import FORMATS
from export.probes import TEXTS
from export.rounding import ALGORITHMS, MOVED, round_blocks
from export.verify import verify

# hidden 96, queries 4 x 32 = 128, keys 2 x 32 = 64, ffn 160: no two alike, and whole blocks of 32 all of them
SIZES = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-square": ("qwen2", {"hidden_size": 128}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
}
needs_llama_cpp = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama.cpp: make llama-cpp")
EVERY = [
    pytest.param(f"{format}-{precision}", marks=needs_llama_cpp if precision in k_quants.MIXES else ())
    for format, known in export.PRECISIONS.items()
    for precision in known
]
# what the builder is not used for: Conv1D, Gemm and a table of positions; windows, norms of 1 + weight
TRACED: dict[str, dict[str, Any]] = {"gpt2": {}, "gemma3_text": {"sliding_window": 8, "tie_word_embeddings": True}}


def tiny(folder: Path, name: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """A tiny model whose tokenizer merges "he", "ll" and " w", which llama.cpp wants of byte-level BPE."""
    model_type, settings = MODELS[name]
    save_tiny(folder, model_type, seed=seed, **(SIZES | settings | {"vocab_size": 264} | overrides))
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    state["model"]["merges"] = [["h", "e"], ["l", "l"], ["\u0120", "w"]]
    state["model"]["vocab"] |= {"".join(merge): 259 + i for i, merge in enumerate(state["model"]["merges"])}
    path.write_text(json.dumps(state))
    return folder


@pytest.fixture(scope="module", params=TRACED)
def traced(request, tmp_path_factory) -> tuple[Path, Path, Settings]:
    """A student of another architecture, and its int4 graph, not yet verified."""
    folder = tmp_path_factory.mktemp(request.param)
    sizes = SIZES | {"vocab_size": 259, "head_dim": 24} | TRACED[request.param]
    save_tiny(folder / "student", request.param, **sizes)
    settings = written(folder / "student", folder / "int4", "onnx-int4", sensitive=("head", "last"))
    return folder / "student", folder / "int4", settings


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return tiny(tmp_path_factory.mktemp("student"), "llama-tied")


def written(student: Path, folder: Path, name: str, **dials: Any) -> Settings:
    """An artifact that nothing has verified yet."""
    settings = replace(export.parse(name), **dials)
    folder.mkdir(parents=True)
    FORMATS[settings.format].write(student, folder, settings)
    return settings


def check(student: Path, folder: Path, settings: Settings) -> dict[str, dict[str, Any]]:
    return {found["check"]: found for found in verify(student, folder, settings, FORMATS[settings.format])[0]}


@pytest.mark.parametrize("name", EVERY)
def test_every_format_and_precision_is_the_student(student, tmp_path, name):
    out = tmp_path / name
    manifest = export.export(student, export.parse(name), out)
    assert export.read_manifest(out) == manifest
    assert {"size", "tokenizer", "chat template", "greedy tokens"} <= {found["check"] for found in manifest["checks"]}
    assert not [
        warning for warning in manifest["warnings"] if "stay as they are" not in warning and "older type" not in warning
    ]
    runtime = load(out)
    assert isinstance(runtime, Runtime)
    assert runtime.parameters == manifest["parameters"] == Checkpoint(student).shape.parameters
    assert runtime.nbytes == manifest["bytes"]
    assert manifest["bits_per_weight"] == 8 * runtime.nbytes / runtime.parameters
    asked = [{"messages": [{"role": "user", "content": "hi"}]}]
    assert runtime.complete(asked, max_new_tokens=8) == [
        "".join(runtime.stream(asked[0]["messages"], max_new_tokens=8)).strip()
    ]


@pytest.mark.parametrize("name", ["onnx-int4", "gguf-q8_0"])
@pytest.mark.parametrize("model", MODELS)
def test_every_family_passes(tmp_path, model, name):
    source = tiny(tmp_path / "student", model)
    settings = export.parse(name)
    export.export(source, settings, tmp_path / name)


@pytest.mark.parametrize("name", ["onnx-int4", "gguf-q8_0"])
@pytest.mark.parametrize("how", ["width", "depth"])
def test_pruned_students_pass(tmp_path, how, name):
    teacher = Checkpoint(
        tiny(tmp_path / "teacher", "llama-tied", num_hidden_layers=4, hidden_size=128, intermediate_size=224)
    )
    smaller = {"hidden": 96, "ffn": 160} if how == "width" else {"num_layers": 2}
    shape = replace(teacher.shape, **smaller)
    kept = Kept(
        layers=tuple(range(shape.num_layers)),
        hidden=tuple(range(shape.hidden)),
        ffn=(tuple(range(shape.ffn)),) * shape.num_layers,
        heads=(tuple(range(shape.num_heads)),) * shape.num_layers,
    )
    prune(teacher, tmp_path / "student", kept=kept, shape=shape)
    export.export(tmp_path / "student", export.parse(name), tmp_path / name)


def test_an_architecture_without_a_row_is_traced(traced):
    student, folder, settings = traced
    found = check(student, folder, settings)
    assert found["logits of model.onnx in onnxruntime, activations in float32"]["error"] < 1e-4
    runtime = OnnxRuntime(folder)
    assert runtime.parameters == AutoModelForCausalLM.from_pretrained(student).num_parameters()
    assert [len(list(runtime.tokens([5, 6], max_new_tokens=n, ignore_eos=True))) for n in (1, 9)] == [1, 9]


def test_a_changed_traced_graph_is_caught(traced, tmp_path):
    student, folder, settings = traced
    copytree(folder, tmp_path / "a")
    stem = "transformer.h.1.mlp.c_fc" if "gpt2" in str(student) else "model.layers.1.mlp.down_proj"
    path, offset, _ = in_data(tmp_path / "a", f"{stem}.weight_q4")
    edit(path, offset, another_block)
    with pytest.raises(CheckFailed, match=rf"{stem}.weight\[\d+, \d+\] is .* more than rounding explains"):
        check(student, tmp_path / "a", settings)


def test_float16_traces_keep_rope_and_norms_in_order(tmp_path):
    student = save_tiny(tmp_path / "student", "gemma3_text", **(SIZES | {"num_hidden_layers": 2}))
    check(student, tmp_path / "a", written(student, tmp_path / "a", "onnx-fp16"))


def test_a_window_of_attention_is_not_lost_in_onnx(tmp_path, monkeypatch):
    """The builder would lose it: Mistral's config has no layer_types, which it goes by."""
    student = tiny(tmp_path / "student", "mistral", sliding_window=16, num_hidden_layers=2)
    export.export(student, export.parse("onnx-int4"), tmp_path / "a")
    monkeypatch.setattr(to_onnx, "is_traced", lambda student: False)
    with pytest.raises(CheckFailed, match=r"logits of model\.onnx in onnxruntime differ from torch"):
        export.export(student, export.parse("onnx-int4"), tmp_path / "b")


@pytest.mark.parametrize("web", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gptq_rounds_what_is_traced_too(traced, tmp_path, web):
    student, _, settings = traced
    settings = replace(settings, algorithm="gptq", web=web)
    export.export(student, settings, tmp_path / "a", calibration=batches)


ODD = {
    "mamba": (
        {"state_size": 4, "num_hidden_layers": 2},
        "has more than two axes; expected linear layers, no experts or conv",
    ),
    "mixtral": ({"num_local_experts": 2}, "has more than two axes; expected linear layers, no experts"),
    "bloom": ({"n_head": 4, "max_position_embeddings": None}, "names no max_position_embeddings"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_cannot_be_traced_is_one_line(tmp_path, name):
    sizes, message = ODD[name]
    student = save_tiny(tmp_path / "student", name, **(SIZES | sizes))
    with pytest.raises(UserError, match=message):
        export.export(student, export.parse("onnx-fp32"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_what_is_no_decoder_is_one_line(student, tmp_path):
    copytree(student, tmp_path / "t5")
    (tmp_path / "t5" / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 264, "d_model": 32}))
    with pytest.raises(UserError, match="cannot trace this t5 model"):
        export.export(tmp_path / "t5", export.parse("onnx-fp32"), tmp_path / "a")


def test_a_padding_token_far_into_the_vocabulary_goes_into_gguf(tmp_path):
    student = tiny(tmp_path / "student", pad_token_id=200)
    check(student, tmp_path / "a", written(student, tmp_path / "a", "gguf-f32"))


def test_the_only_layer_is_the_first_and_the_last():
    settings = replace(export.parse("onnx-int4"), sensitive=("first",))
    sizes: dict[str, Any] = {"tied": True, "precision": "int4"}
    assert settings.bits("model.layers.0.mlp.up_proj.weight", layers=1, **sizes) == 8
    assert settings.bits("model.layers.1.mlp.up_proj.weight", layers=2, **sizes) == 4


def test_an_answer_that_ends_elsewhere_is_caught(student, tmp_path):
    settings = written(student, tmp_path / "a", "onnx-int4")
    path = tmp_path / "a" / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["eos_token_id"] = [1, 77]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckFailed, match=r"an answer ends at \[1, 77\] in the artifact, \[1\] in the student"):
        check(student, tmp_path / "a", settings)


@needs_llama_cpp
@pytest.mark.parametrize("precision", k_quants.MIXES)
def test_k_quants_hold_what_fills_their_blocks(tmp_path, precision):
    import gguf

    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 8}
    student = tiny(tmp_path / "student", **sizes)
    manifest = export.export(student, export.parse(f"gguf-{precision}"), tmp_path / "a")
    assert not manifest["warnings"]
    kinds = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(tmp_path / "a" / "model.gguf").tensors}
    most, more = k_quants.MIXES[precision]
    # llama.cpp's own mix of 8 layers: the first, the last, and every third between
    assert [i for i in range(8) if kinds[f"blk.{i}.attn_v.weight"] == more] == (
        [0, 3, 6, 7] if most != more else list(range(8))
    )
    assert (kinds["blk.1.attn_q.weight"], kinds["output.weight"]) == (most, more)


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["q4_k", "q5_k", "q6_k"])
@pytest.mark.parametrize("what", ["normal", "outliers", "tiny", "one sign"])
def test_the_intervals_of_k_quants_hold_their_weights_and_no_others(kind, what):
    import gguf

    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))
    if what == "outliers":
        weight[:, ::32] *= 30
    elif what == "tiny":
        weight[:32] *= 1e-9
        weight[40:, 100:140] *= 1e-4
    elif what == "one sign":
        weight = weight.abs() + 1

    def read(data: Any) -> tuple[torch.Tensor, ...]:
        value = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind.upper()])
        return read_back._super_steps(torch.from_numpy(value.copy()), data, kind.upper())

    data = k_quants.pack(weight.numpy(), kind)
    _, low, high = read(data)
    assert ((weight >= low) & (weight <= high)).all()
    data[-1, 20:36] = 255 - data[-1, 20:36]
    _, low, high = read(data)
    assert ((weight < low) | (weight > high)).sum() > 8


def test_k_quants_without_their_library_are_one_line(student, tmp_path, monkeypatch):
    monkeypatch.setattr(k_quants, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"packed by llama\.cpp's library, which is not installed"):
        export.export(student, export.parse("gguf-q4_k_m"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "gptq"])
@pytest.mark.parametrize("sensitive", [(), ("head",), ("head", "first", "last")])
def test_algorithms_and_sensitive_parts_of_int4(student, tmp_path, algorithm, sensitive):
    settings = written(student, tmp_path / "a", "onnx-int4", algorithm=algorithm, sensitive=sensitive, block=64)
    check(student, tmp_path / "a", settings)


SOME = ["onnx-int4", "onnx-fp16", "gguf-q4_0", "gguf-f16", "bitsandbytes-nf4", "bitsandbytes-int8"]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_students_stored_in_16_bits_pass(tmp_path, dtype, name):
    student = tiny(tmp_path / "student", "llama-tied")
    AutoModelForCausalLM.from_pretrained(student, dtype=dtype).save_pretrained(student)
    check(student, tmp_path / "a", written(student, tmp_path / "a", name))


def test_sizes_that_no_block_divides_are_filled_up(tmp_path):
    student = save_tiny(tmp_path / "student", "qwen3", hidden_size=40, intermediate_size=72, tie_word_embeddings=True)
    settings = written(student, tmp_path / "a", "onnx-int4", block=32)
    check(student, tmp_path / "a", settings)


def test_llama3_rope_scaling_survives(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    student = tiny(tmp_path / "student", "llama", rope_parameters=scaling)
    written(student, tmp_path / "onnx", "onnx-fp32")
    check(student, tmp_path / "onnx", export.parse("onnx-fp32"))
    with pytest.raises(UserError, match="rope scaling 'yarn' is not written to GGUF"):
        written(tiny(tmp_path / "yarn", rope_parameters=scaling | {"rope_type": "yarn"}), tmp_path / "g", "gguf-f16")
    written(student, tmp_path / "gguf", "gguf-f32")
    import gguf

    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    # low frequencies are slowed eightfold, high ones are left alone
    assert tensors["rope_freqs.weight"].min() == pytest.approx(1.0)
    assert tensors["rope_freqs.weight"].max() == pytest.approx(8.0)


def test_the_tied_table_is_stored_once(student, tmp_path):
    import onnx_ir as ir

    for name in ("onnx-fp32", "onnx-int8", "onnx-int4"):
        written(student, tmp_path / name, name)
        graph = ir.load(tmp_path / name / "model.onnx").graph
        tables = [v for v in graph.initializers.values() if 264 in v.shape.numpy()[:2]]
        readers = {node.op_type for value in tables for node in value.consumers()}
        assert len([value for value in tables if not value.name.endswith("scales")]) == 1, tables
        assert readers >= {"Gather", "MatMul" if name == "onnx-fp32" else "MatMulNBits"}


def test_the_web_folder_has_what_a_browser_asks_for(student, tmp_path):
    settings = replace(export.parse("onnx-int4"), web=True)
    export.export(student, settings, tmp_path / "web")
    files = {str(path.relative_to(tmp_path / "web")) for path in (tmp_path / "web").rglob("*")}
    names = ("model_q4", "model_q4f16", "model_quantized")
    assert {f"onnx/{name}.onnx{data}" for name in names for data in ("", "_data")} <= files
    config = json.loads((tmp_path / "web" / "config.json").read_text())
    assert config["transformers.js_config"]["dtype"] == "q4"
    assert (
        json.loads((tmp_path / "web" / "genai_config.json").read_text())["model"]["decoder"]["filename"]
        == "onnx/model_q4.onnx"
    )


def test_past_and_present_state_head_dim_as_a_number(student, tmp_path):
    import onnxruntime

    written(student, tmp_path / "a", "onnx-fp16")
    session = onnxruntime.InferenceSession(tmp_path / "a" / "model.onnx")
    caches = [v for v in (*session.get_inputs(), *session.get_outputs()) if v.name.startswith(("past", "present"))]
    assert {value.shape[-1] for value in caches} == {32}
    assert {value.type for value in caches} == {"tensor(float16)"}
    assert next(v for v in session.get_outputs() if v.name == "logits").type == "tensor(float)"


# --- rounding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_to_nearest_follows_the_formula(bits):
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    blocks = round_blocks(weight, bits=bits, block=32)
    assert blocks.q_NGB.shape == (5, 3, 32)
    half = 2 ** (bits - 1)
    padded = torch.nn.functional.pad(weight, (0, 26)).view(5, 3, 32)
    for n in range(5):
        for g in range(3):
            largest = max(padded[n, g].tolist(), key=abs)
            scale = largest / -half
            assert float(blocks.scale_NG[n, g]) == pytest.approx(scale, rel=1e-6)
            expected = [min(2 * half - 1, max(0, round(w / scale) + half)) for w in padded[n, g].tolist()]
            assert blocks.q_NGB[n, g].tolist() == expected


def test_four_bits_are_packed_low_half_first():
    blocks = round_blocks(torch.tensor([[-8.0, 7.0] + [0.0] * 14]), bits=4, block=16)
    assert blocks.scale_NG.tolist() == [[1.0]]
    assert blocks.packed()[0, 0].tolist() == [0 | 15 << 4] + [8 | 8 << 4] * 7


def test_a_block_of_zeros_stays_zero():
    for algorithm in ALGORITHMS:
        blocks = round_blocks(torch.zeros(2, 32), bits=4, block=16, algorithm=algorithm)
        zero = 8 if blocks.zero_NG is None else blocks.zero_NG.unsqueeze(-1).float()
        assert ((blocks.q_NGB.float() - zero) * blocks.scale_NG.unsqueeze(-1)).abs().max() == 0, algorithm


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_block_of_one_sign_keeps_its_values(algorithm):
    weight = torch.linspace(1.0, 1.1, 64).repeat(2, 1)
    blocks = round_blocks(weight, bits=4, block=32, algorithm=algorithm)
    zero = 8 if blocks.zero_NG is None else blocks.zero_NG.unsqueeze(-1).float()
    value = (blocks.q_NGB.float() - zero) * blocks.scale_NG.unsqueeze(-1)
    assert (value - weight.view(2, 2, 32)).abs().max() < 0.08


@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "q4_1", "q4_0"])
@pytest.mark.parametrize("what", ["tiny", "outlier", "both"])
def test_what_a_float16_scale_loses_is_within_rounding(kind, what):
    """Scales that vanish in float16, and minima whose own rounding outweighs the steps, are no difference."""
    import gguf

    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(2))
    if what != "outlier":
        weight[:32] *= 1e-12
    if what != "tiny":
        weight[:, ::32] = -40.0
    data = to_gguf.encoded(weight, kind)
    value = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind.upper()]).copy())
    _, low, high = read_back._steps(value, data, kind.upper())
    assert ((weight >= low) & (weight <= high)).all()


def test_searching_a_scale_never_makes_a_block_worse():
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))

    def errors(algorithm: str) -> torch.Tensor:
        blocks = round_blocks(weight, bits=4, block=32, algorithm=algorithm)
        value = (blocks.q_NGB.float() - 8) * blocks.scale_NG.unsqueeze(-1)
        return (value - weight.view(16, 8, 32)).square().sum(-1)

    assert (errors("search") <= errors("rtn") + 1e-6).all()
    assert errors("search").sum() < 0.95 * errors("rtn").sum()


# --- gptq -----------------------------------------------------------------------------------------------------------


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    """Rows of two documents and some padding."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        ids = torch.randint(3, 250, (2, 24), generator=generator)
        positions = torch.cat([torch.arange(10), torch.arange(14)]).expand(2, 24)
        mask = (torch.arange(24) < 20).long().expand(2, 24)
        found.append({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    return found


def test_gptq_changes_a_layers_output_least_and_moves_no_weight_far():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 72, generator=generator)  # 72 is no multiple of the block
    inputs = torch.randn(500, 72, generator=generator) @ torch.randn(72, 72, generator=generator)
    found = gptq.round_on(weight, inputs.T @ inputs, block=32)
    searched = round_blocks(weight, bits=4, block=32, algorithm="search")

    def error(blocks: Any) -> float:
        return float((inputs @ (weight - blocks.values()[:, :72]).T).square().sum())

    assert error(found) < 0.7 * error(searched)
    assert torch.equal(found.scale_NG, searched.scale_NG)
    moved = (found.q_NGB.int() - searched.q_NGB.int()).abs()
    assert 0 < moved.max() <= MOVED


def test_gptq_counts_the_inputs_of_each_layer_and_no_padding(student):
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    layer = model.model.layers[1]
    modules = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.down_proj]
    seen: dict[Any, list[torch.Tensor]] = {module: [] for module in modules}
    runs: list[Any] = []
    hooks = [
        module.register_forward_pre_hook(lambda m, args: seen[m].append(args[0].flatten(0, 1))) for module in modules
    ]
    hooks += [layer.register_forward_pre_hook(lambda _, a, k: runs.append((a[0], a[1:], k)), with_kwargs=True)]
    with torch.no_grad():
        for batch in batches():
            model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        for hook in hooks:
            hook.remove()
        masks = [batch["attention_mask"].flatten().bool() for batch in batches()]
        found = gptq._hessians(layer, modules, runs, masks)
    for module in modules:
        rows = torch.cat(seen[module])[torch.cat(masks)]
        torch.testing.assert_close(found[module], rows.T @ rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("web", [False, True])
def test_gptq_is_the_student_and_nearer_to_it(student, tmp_path, web):
    settings = replace(export.parse("onnx-int4"), algorithm="gptq", web=web)
    with pytest.raises(
        UserError, match="gptq rounds by what text does in the model; expected some; give it with --data"
    ):
        export.export(student, settings, tmp_path / "none")
    export.export(student, settings, tmp_path / "a", calibration=batches)
    export.export(student, replace(settings, algorithm="search"), tmp_path / "b")
    reference = load(student)

    def distance(folder: Path) -> float:
        runtime = load(folder)
        ids = [batch["input_ids"][0, :20] for batch in batches()]
        return sum(float((runtime.logits(row)[:, :264] - reference.logits(row)).square().mean()) for row in ids)

    assert distance(tmp_path / "a") < distance(tmp_path / "b")


@pytest.mark.parametrize("part", ["weights", "scales"])
def test_a_changed_gptq_graph_is_caught(student, tmp_path, part):
    settings = replace(export.parse("onnx-int4"), algorithm="gptq")
    FORMATS["onnx"].write(student, tmp_path, settings, calibration=batches)
    tensor, change = (f"{MATRIX}_scales", doubled("<f4")) if part == "scales" else (f"{MATRIX}_q4", another_block)
    path, offset, _ = in_data(tmp_path, tensor)
    edit(path, offset, change)
    with pytest.raises(CheckFailed, match=rf"{HF_MATRIX}\[\d+, \d+\] is .* more than rounding explains"):
        check(student, tmp_path, settings)


# --- what is not the student is caught ------------------------------------------------------------------------------


def in_data(folder: Path, tensor: str) -> tuple[Path, int, int]:
    """The data file of an ONNX folder, and where a tensor lies in it."""
    import onnx_ir as ir

    stored = ir.load(folder / "model.onnx").graph.initializers[tensor].const_value
    return folder / "model.onnx.data", stored.offset, stored.length


def edit(path: Path, offset: int, change) -> None:
    """Change bytes of a file from `offset` on: `change` takes and gives 64 of them."""
    data = bytearray(path.read_bytes())
    data[offset : offset + 64] = change(bytes(data[offset : offset + 64]))
    path.write_bytes(data)


def another_block(data: bytes) -> bytes:
    return bytes(255 - byte for byte in data[:16]) + data[16:]


def doubled(dtype: str):
    return lambda data: (numpy.frombuffer(data, dtype) * 2).astype(dtype).tobytes()


MATRIX = "model.layers.1.mlp.up_proj.MatMul.weight"
HF_MATRIX = "model.layers.1.mlp.up_proj.weight"


ONNX_PARTS = [(f"onnx-{p}", "weights") for p in ("fp32", "fp16", "int8", "int4")] + [
    ("onnx-int8", "scales"),
    ("onnx-int4", "scales"),
]


@pytest.mark.parametrize(("name", "part"), ONNX_PARTS)
def test_a_changed_onnx_file_is_caught(student, tmp_path, name, part):
    settings = written(student, tmp_path / "a", name)
    suffix = {"onnx-int8": "_q8", "onnx-int4": "_q4"}.get(name, "")
    tensor, change = (f"{MATRIX}_scales", doubled("<f4")) if part == "scales" else (f"{MATRIX}{suffix}", another_block)
    path, offset, _ = in_data(tmp_path / "a", tensor)
    edit(path, offset, change)
    with pytest.raises(CheckFailed, match=rf"{HF_MATRIX}\[\d+, \d+\] is .* more than rounding explains"):
        check(student, tmp_path / "a", settings)


def gguf_offset(path: Path, tensor: str) -> int:
    import gguf

    return int(next(found for found in gguf.GGUFReader(path).tensors if found.name == tensor).data_offset)


@needs_llama_cpp
@pytest.mark.parametrize("part", ["weights", "scales"])
@pytest.mark.parametrize(("precision", "scale"), [("q4_k_m", 0), ("q5_k_m", 0), ("q6_k", 208)])
def test_a_changed_k_quant_is_caught(tmp_path, precision, scale, part):
    student = tiny(tmp_path / "student", hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    settings = written(student, tmp_path / "a", f"gguf-{precision}")
    path = tmp_path / "a" / "model.gguf"
    offset = gguf_offset(path, "blk.1.ffn_up.weight")
    if part == "scales":
        edit(path, offset + scale, lambda data: doubled("<f2")(data[:2]) + data[2:])
    else:
        edit(path, offset + 20, another_block)
    with pytest.raises(CheckFailed, match="more than rounding explains"):
        check(student, tmp_path / "a", settings)


@pytest.mark.parametrize("name", ["gguf-f16", "gguf-q8_0", "gguf-q4_0", "gguf-q4_1", "gguf-q5_0", "gguf-q5_1"])
@pytest.mark.parametrize("part", ["weights", "scales"])
def test_a_changed_gguf_file_is_caught(student, tmp_path, name, part):
    settings = written(student, tmp_path / "a", name)
    path = tmp_path / "a" / "model.gguf"
    offset = gguf_offset(path, "blk.1.ffn_up.weight")
    if part == "scales":
        edit(path, offset, lambda data: doubled("<f2")(data[:2]) + data[2:])
    else:
        edit(path, offset + 8, another_block)
    with pytest.raises(CheckFailed, match="more than rounding explains"):
        check(student, tmp_path / "a", settings)


@pytest.mark.parametrize("name", ["bitsandbytes-nf4", "bitsandbytes-int8"])
@pytest.mark.parametrize("part", ["weights", "scales"])
def test_a_changed_bitsandbytes_folder_is_caught(student, tmp_path, name, part):
    settings = written(student, tmp_path / "a", name)
    path = tmp_path / "a" / "model.safetensors"
    tensors = load_file(path)
    matrix = "model.layers.1.self_attn.o_proj"  # of whole blocks of 64
    if part == "scales":
        tensors[f"{matrix}.weight.absmax" if name.endswith("nf4") else f"{matrix}.SCB"] *= 2
    else:
        flat = tensors[f"{matrix}.weight"].view(torch.uint8).flatten()
        flat[:16] = 255 - flat[:16]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckFailed, match="more than rounding explains"):
        check(student, tmp_path / "a", settings)


@pytest.mark.parametrize("name", ["onnx-int4", "gguf-q8_0", "bitsandbytes-nf4"])
def test_a_swapped_token_is_caught(student, tmp_path, name):
    settings = written(student, tmp_path / "a", name)
    path = tmp_path / "a" / "tokenizer.json"
    state = json.loads(path.read_text())
    vocab = state["model"]["vocab"]
    vocab["e"], vocab["o"] = vocab["o"], vocab["e"]
    path.write_text(json.dumps(state))
    with pytest.raises(CheckFailed, match=r"the tokenizer reads .Hello, world! .* otherwise from token 1"):
        check(student, tmp_path / "a", settings)


def test_a_swapped_token_inside_a_gguf_file_is_caught(student, tmp_path, monkeypatch):
    real = gguf_tokenizer.tokenizer_fields

    def swapped(*args: Any, **kwargs: Any) -> dict[str, Any]:
        fields = real(*args, **kwargs)
        tokens = fields["tokenizer.ggml.tokens"]
        tokens[50], tokens[51] = tokens[51], tokens[50]
        return fields

    with monkeypatch.context() as patch:
        patch.setattr(to_gguf, "tokenizer_fields", swapped)
        settings = written(student, tmp_path / "a", "gguf-q8_0")
    with pytest.raises(CheckFailed, match=r"token 50 is '.+' in the student and '.+' in the GGUF file"):
        check(student, tmp_path / "a", settings)


def test_another_chat_template_is_caught(student, tmp_path):
    settings = written(student, tmp_path / "a", "onnx-int4")
    (tmp_path / "a" / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("<|end|>", "<|END|>"))
    with pytest.raises(CheckFailed, match="the chat template gives other ids"):
        check(student, tmp_path / "a", settings)


def test_a_wrong_graph_is_caught_although_every_weight_is_right(student, tmp_path):
    import onnx_ir as ir

    settings = written(student, tmp_path / "a", "onnx-int4")
    model = ir.load(tmp_path / "a" / "model.onnx")
    for node in model.graph:
        if node.op_type == "GroupQueryAttention" and "layers.2" in node.name:
            node.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", 1)
    ir.save(model, tmp_path / "a" / "model.onnx")
    with pytest.raises(CheckFailed, match=r"logits of model.onnx in onnxruntime differ from torch"):
        check(student, tmp_path / "a", settings)


def test_an_unpermuted_gguf_is_caught(student, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(to_gguf, "permuted", lambda name, weight, shape: weight)
        settings = written(student, tmp_path / "a", "gguf-f16")
    with pytest.raises(CheckFailed, match=r"self_attn.[qk]_proj.weight.* more than rounding explains"):
        check(student, tmp_path / "a", settings)


def test_a_float_copy_left_behind_shows_in_the_size(student, tmp_path):
    settings = written(student, tmp_path / "a", "onnx-int8")
    with (tmp_path / "a" / "model.onnx.data").open("ab") as file:
        file.write(bytes(264 * 96 * 4))
    with pytest.raises(CheckFailed, match=r"model.onnx holds [\d,]+ bytes of weights where arithmetic says"):
        check(student, tmp_path / "a", settings)


def test_a_float_copy_inside_the_graph_shows_too(student, tmp_path):
    import onnx_ir as ir

    settings = written(student, tmp_path / "a", "onnx-int4")
    model = ir.load(tmp_path / "a" / "model.onnx")
    model.graph.initializers.add(ir.Value(name="copy", const_value=ir.tensor(numpy.zeros((264, 96), numpy.float32))))
    ir.save(model, tmp_path / "a" / "model.onnx")
    with pytest.raises(CheckFailed, match="bytes of weights where arithmetic says"):
        check(student, tmp_path / "a", settings)


@pytest.mark.parametrize("key", ["rope_freq_base", "layer_norm_rms_eps", "head_count_kv"])
def test_metadata_that_only_llama_cpp_reads_is_checked(student, tmp_path, monkeypatch, key):
    import gguf

    real = getattr(gguf.GGUFWriter, f"add_{key}")
    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, f"add_{key}", lambda self, value: real(self, value * 2))
        settings = written(student, tmp_path / "a", "gguf-q8_0")
    with pytest.raises(CheckFailed, match=r"llama\..* of the GGUF file is .*, and .* in the student"):
        check(student, tmp_path / "a", settings)


def test_rope_factors_that_are_not_the_students_are_caught(tmp_path, monkeypatch):
    scaling = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    student = tiny(tmp_path / "student", "llama", rope_parameters=scaling)
    check(student, tmp_path / "a", written(student, tmp_path / "a", "gguf-f32"))
    real = to_gguf._rope_factors
    with monkeypatch.context() as patch:
        patch.setattr(to_gguf, "_rope_factors", lambda config: 2 * real(config))
        settings = written(student, tmp_path / "b", "gguf-f32")
    with pytest.raises(CheckFailed, match="the GGUF file turns channels by"):
        check(student, tmp_path / "b", settings)


class SecondBest(OnnxRuntime):
    def tokens(self, ids, *, max_new_tokens, **_):
        ids = list(ids)
        for _ in range(max_new_tokens):
            ids.append(int(self.logits(torch.tensor(ids))[-1].topk(2).indices[1]))
            yield ids[-1]


class Silent(OnnxRuntime):
    def tokens(self, ids, **_):
        yield from ()


@pytest.mark.parametrize(("runtime", "says"), [(SecondBest, "greedy token 0 is"), (Silent, "decoded 0 of 24 tokens")])
def test_other_greedy_tokens_are_caught(student, tmp_path, runtime, says):
    settings = written(student, tmp_path / "a", "onnx-fp32")
    with pytest.raises(CheckFailed, match=says):
        verify(student, tmp_path / "a", settings, replace(FORMATS["onnx"], open=runtime))


@pytest.mark.parametrize("place", ["student", ".", "full"])
def test_an_export_takes_the_place_of_nothing_else(student, tmp_path, monkeypatch, place):
    copytree(student, tmp_path / "student")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="holds something else than an export"):
        export.export("student", export.parse("onnx-fp32"), place)
    assert sorted(tmp_path.rglob("*")) == before


def test_two_exports_to_one_place_do_not_meet(student, tmp_path):
    from compressor.run import alone

    with alone(tmp_path / "a"), pytest.raises(UserError, match="another process is writing"):
        export.export(student, export.parse("onnx-fp32"), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_copy_without_its_weights_is_told_by_name(student, tmp_path):
    export.export(student, export.parse("onnx-fp32"), tmp_path / "a")
    (tmp_path / "a" / "model.onnx.data").unlink()
    with pytest.raises(UserError, match=r"a lacks model\.onnx\.data; expected each of the \d+ files"):
        load(tmp_path / "a")


def test_a_missing_tokenizer_is_one_line(student, tmp_path):
    copytree(student, tmp_path / "s")
    (tmp_path / "s" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no usable tokenizer"):
        export.export(tmp_path / "s", export.parse("onnx-fp32"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_failed_check_keeps_nothing_and_an_older_artifact_stays(student, tmp_path, monkeypatch):
    out = tmp_path / "kept"
    export.export(student, export.parse("onnx-int8"), out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    row = FORMATS["onnx"]

    def broken(source: Path, folder: Path, settings: Settings, **options: Any) -> None:
        row.write(source, folder, settings, **options)
        path, offset, _ = in_data(folder, f"{MATRIX}_q8")
        edit(path, offset, another_block)

    monkeypatch.setitem(FORMATS, "onnx", replace(row, write=broken))
    for target in (out, tmp_path / "new"):
        with pytest.raises(CheckFailed, match=r"onnx-int8 of .* is not the student, so it was not kept: model\.layers"):
            export.export(student, export.parse("onnx-int8"), target)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]


# --- tokenizers -----------------------------------------------------------------------------------------------------


def test_the_demo_tokenizer_splits_like_llama_in_every_runtime(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    fields = gguf_tokenizer.tokenizer_fields(DEMO_FOLDER, 2560)
    assert fields["tokenizer.ggml.pre"] == "llama-bpe"
    assert fields["tokenizer.ggml.tokens"][tokenizer.eos_token_id] == "<|end|>"
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert fields["tokenizer.ggml.add_bos_token"] is False
    rebuilt = gguf_tokenizer.rebuilt(fields)
    asked = [task["messages"][-1]["content"] for name in SKILLS for task in tasks.suite(name, 20, seed=0)]
    for text in (*TEXTS, *asked):
        assert rebuilt.encode(text, add_special_tokens=False).ids == tokenizer(text, add_special_tokens=False).input_ids
    for whole in (" [1]", " [3]", "get_weather", " plan_meeting"):  # which Llama's expression would cut
        assert len(tokenizer(whole, add_special_tokens=False).input_ids) == 1


def test_a_tokenizer_that_llama_cpp_cannot_split_is_refused_unless_its_rule_is_given(tmp_path):
    student = tiny(tmp_path / "student")
    state = json.loads((student / "tokenizer.json").read_text())
    # across a space, which every rule of llama.cpp's cuts at
    state["model"]["vocab"]["o\u0120"] = state["model"]["vocab"].pop("\u0120w")
    state["model"]["merges"][2] = ["o", "\u0120"]
    state["pre_tokenizer"] |= {"use_regex": False}
    (student / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(CheckFailed, match=r"llama.cpp splits \d+ of 17 texts otherwise, first .* --tokenizer-pre"):
        export.export(student, export.parse("gguf-q8_0"), tmp_path / "a")
    manifest = export.export(student, replace(export.parse("gguf-q8_0"), tokenizer_pre="gpt-2"), tmp_path / "a")
    assert any("give it token ids" in warning for warning in manifest["warnings"])


def sentencepiece(folder: Path) -> Path:
    """A tiny model whose tokenizer is SentencePiece's BPE: bytes for unknown characters, a space before the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    save_tiny(folder, "llama", **(SIZES | {"vocab_size": 320}))
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581helowrd,!."]
    pieces += ["he", "ll", "\u2581w"]
    merges = [("h", "e"), ("l", "l"), ("\u2581", "w")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


def test_a_sentencepiece_tokenizer_goes_into_gguf(tmp_path):
    student = sentencepiece(tmp_path / "student")
    manifest = export.export(student, export.parse("gguf-f16"), tmp_path / "a")
    fields = formats.gguf_fields(tmp_path / "a")
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    types = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert (types["<unk>"], types["<0x41>"], types["he"], types["[PAD300]"]) == (2, 6, 1, 5)
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    assert scores["he"] > scores["ll"] > scores["\u2581w"] > scores["h"]
    tokenizer = AutoTokenizer.from_pretrained(student)
    rebuilt = gguf_tokenizer.rebuilt(fields)
    for text in ("hello world!", "w", "caf\u00e9 \U0001f600"):
        assert rebuilt.encode(text, add_special_tokens=False).ids == tokenizer(text, add_special_tokens=False).input_ids
    # SentencePiece puts a space before a text that begins with one, transformers does not: told, and not hidden
    assert any("llama.cpp splits" in warning for warning in manifest["warnings"])


def test_llama_cpp_itself_took_part(student, tmp_path):
    pytest.importorskip("llama_cpp")
    found = check(student, tmp_path / "a", written(student, tmp_path / "a", "gguf-f16"))
    assert found["logits of model.gguf in llama.cpp"]["error"] < 0.05
    runtime = LlamaCppRuntime(tmp_path / "a")
    rebuilt = gguf_tokenizer.rebuilt(formats.gguf_fields(tmp_path / "a"))
    for text in TEXTS:
        assert runtime.tokenize(text) == rebuilt.encode(text, add_special_tokens=False).ids


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tflite", "format 'tflite' is not known; expected one of onnx, bitsandbytes, gguf"),
        ("onnx-int3", "precision of onnx 'int3' is not known; expected one of fp32, fp16, int8, int4"),
        ("gguf-q3_k_m", "precision of gguf 'q3_k_m' is not known"),
    ],
)
def test_unknown_formats_and_precisions_are_named(text, message):
    with pytest.raises(UserError, match=message):
        export.parse(text)


def test_sizes_that_bitsandbytes_kernels_refuse_are_found_before(tmp_path):
    student = save_tiny(tmp_path / "student")  # hidden 48, ffn 80
    with pytest.raises(
        UserError, match="no matrix of this model can be packed as nf4: its sizes are no multiples of 32"
    ):
        export.export(student, export.parse("bitsandbytes-nf4"), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    partly = Checkpoint(tiny(tmp_path / "partly", hidden_size=128)).shape  # ffn 160 is no multiple of 64
    assert to_bitsandbytes.refused(partly, "nf4") == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]


def test_an_architecture_the_builder_does_not_know_is_one_line(student, tmp_path):
    copytree(student, tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["LlamaForSomethingElse"]}))
    with pytest.raises(UserError, match="builder refuses this model"):
        export.export(tmp_path / "other", export.parse("onnx-fp32"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_tokenizer_without_merges_is_refused_by_gguf(tmp_path):
    with pytest.raises(UserError, match="the tokenizer has no merges"):
        export.export(save_tiny(tmp_path / "student"), export.parse("gguf-f16"), tmp_path / "a")


def test_a_window_of_attention_is_not_lost_in_gguf(tmp_path):
    student = tiny(tmp_path / "student", "mistral", sliding_window=16)
    with pytest.raises(UserError, match="attends to a window of 16 tokens"):
        export.export(student, export.parse("gguf-f16"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_unverified_folder_of_another_model_does_not_pass(student, tmp_path):
    other = tiny(tmp_path / "other", "llama-tied", seed=1)
    settings = written(other, tmp_path / "a", "onnx-int8")
    with pytest.raises(CheckFailed, match="more than rounding explains"):
        check(student, tmp_path / "a", settings)


def test_the_reference_is_left_with_the_weights_that_the_runtime_holds(student, tmp_path):
    """What read_back gives, put into torch, is what the runtime computes: its reading is right, not only consistent."""
    written(student, tmp_path / "a", "gguf-q4_0")
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value, _, _ in read_back.gguf_weights(tmp_path / "a" / "model.gguf", Checkpoint(student).shape):
            parameters[name].copy_(value)
    ids = torch.arange(3, 40)
    torch.testing.assert_close(FORMATS["gguf"].open(tmp_path / "a").logits(ids), model(ids[None]).logits[0].detach())
