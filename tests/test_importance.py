"""Importance scores against a float64 reference written from the papers' formulas, on tiny real models."""

from pathlib import Path

import pytest
import torch
from models import tiny_model

from compressor.errors import UserError
from compressor.families import FAMILIES
from compressor.importance import BATCH, SEQUENCE, candidate_blocks, measure, removal_loss, skipped
from compressor.scores import Scores
from compressor.shape import Shape

LENGTHS = (9, 14, 5, 11, 14, 1)


def row(length: int) -> torch.Tensor:
    return torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(length))


def batches(size: int, *, side: str = "right", extra: int = 0) -> list[dict[str, torch.Tensor]]:
    """The same six rows in batches of `size`, padded with a token that is not neutral."""
    made = []
    for start in range(0, len(LENGTHS), size):
        rows = [row(n) for n in LENGTHS[start : start + size]]
        width = max(len(r) for r in rows) + extra
        ids, mask = torch.full((len(rows), width), 77), torch.zeros(len(rows), width, dtype=torch.long)
        for k, r in enumerate(rows):
            place = slice(0, len(r)) if side == "right" else slice(width - len(r), width)
            ids[k, place], mask[k, place] = r, 1
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


AGGREGATIONS = {
    "mean": lambda x: x.abs().mean(0),
    "l2": lambda x: x.pow(2).sum(0).sqrt(),
    "var": lambda x: (x - x.mean(0)).pow(2).mean(0),
}


def reference(model, *, batch: str, sequence: str) -> dict[str, torch.Tensor]:
    """Every activation of every row is kept, in float64; then the formulas, as printed."""
    kept: dict[str, list[torch.Tensor]] = {}
    handles = []

    def note(name, value):
        kept.setdefault(name, []).append(value[0].double())

    for i, layer in enumerate(model.model.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            module = getattr(layer, norm)
            handles.append(module.register_forward_hook(lambda m, a, o, n=f"norm.{norm}.{i}": note(n, o)))
        down, out = layer.mlp.down_proj, layer.self_attn.o_proj
        handles.append(down.register_forward_hook(lambda m, a, o, n=f"ffn.{i}": note(n, a[0])))
        handles.append(out.register_forward_hook(lambda m, a, o, n=f"heads.{i}": note(n, a[0])))
    handles.append(model.model.norm.register_forward_hook(lambda m, a, o: note("norm.final", o)))
    states = []
    with torch.inference_mode():
        for length in LENGTHS:
            output = model.model(input_ids=row(length)[None], use_cache=False, output_hidden_states=True)
            # the last of hidden_states is after the final norm; the input of that norm is what layer L left
            states.append([h[0].double() for h in output.hidden_states[:-1]])
    for handle in handles:
        handle.remove()

    def both(rows):
        return AGGREGATIONS[batch](torch.stack([AGGREGATIONS[sequence](r) for r in rows]))

    count = len(model.model.layers)
    cosines = torch.zeros(count - 1, dtype=torch.float64)
    for i in range(count - 1):
        pairs = [torch.cosine_similarity(s[i], s[i + 1], dim=-1) for s in states]
        cosines[i] = torch.cat(pairs).mean()
    split = {i: [r.unflatten(-1, (6, 16)).norm(dim=-1) for r in kept[f"heads.{i}"]] for i in range(count)}
    return {
        "hidden": sum(both(rows) for name, rows in kept.items() if name.startswith("norm")),
        "ffn": torch.stack([both(kept[f"ffn.{i}"]) for i in range(count)]),
        "heads": torch.stack([both(split[i]) for i in range(count)]),
        "layers": 1 - cosines,
    }


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("batch", BATCH)
@pytest.mark.parametrize("sequence", SEQUENCE)
def test_scores_follow_the_formulas(model_type, batch, sequence) -> None:
    model = tiny_model(model_type)
    scores = measure(model, batches(4), batch=batch, sequence=sequence)
    expected = reference(model, batch=batch, sequence=sequence)
    for name in ("hidden", "ffn", "heads"):
        torch.testing.assert_close(getattr(scores, name).double(), expected[name], rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(scores.layers[:-1].double(), expected["layers"], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("batch", BATCH)
def test_scores_do_not_depend_on_batching_or_padding(batch) -> None:
    model = tiny_model()
    one = measure(model, batches(1), batch=batch, block_sizes=(2, 3))
    for other in (batches(4), batches(6, extra=9), batches(3, side="left")):
        scores = measure(model, other, batch=batch, block_sizes=(2, 3))
        for name in ("hidden", "ffn", "heads", "layers"):
            torch.testing.assert_close(getattr(scores, name), getattr(one, name), rtol=1e-4, atol=1e-6)
        for size in (2, 3):
            torch.testing.assert_close(scores.blocks[size], one.blocks[size], rtol=1e-4, atol=1e-6)
        assert scores.calibration == one.calibration
    changed = batches(1)
    changed[0]["input_ids"][0, 0] += 1
    assert measure(model, changed).calibration != one.calibration


def test_block_influence_of_contiguous_blocks() -> None:
    """1 - E[cos] between what enters the first and what leaves the last layer of the block."""
    model = tiny_model()
    scores = measure(model, batches(2), block_sizes=(2, 3))
    entered, left = {}, {}
    handles = []
    for i, layer in enumerate(model.model.layers):
        handles.append(layer.register_forward_pre_hook(lambda m, a, i=i: entered.setdefault(i, []).append(a[0][0])))
        handles.append(layer.register_forward_hook(lambda m, a, o, i=i: left.setdefault(i, []).append(o[0])))
    with torch.inference_mode():
        for length in LENGTHS:
            model.model(input_ids=row(length)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    for size, first in ((1, 0), (1, 2), (2, 0), (2, 1), (3, 0)):
        x, y = torch.cat(entered[first]).double(), torch.cat(left[first + size - 1]).double()
        expected = 1 - torch.cosine_similarity(x, y, dim=-1).mean()
        measured = scores.layers if size == 1 else scores.blocks[size]
        assert float(measured[first]) == pytest.approx(float(expected), abs=1e-5)
    assert set(scores.blocks) == {2, 3}


def test_variance_is_exact_far_from_zero() -> None:
    """A sum of squares minus a squared sum would lose it: activations near 1000, row means a few apart."""
    model = tiny_model(mlp_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.mul_(1e-2)
            layer.mlp.gate_proj.bias.fill_(1000.0)
            layer.mlp.up_proj.weight.mul_(1e-2)
            layer.mlp.up_proj.bias.fill_(1.0)
    scores = measure(model, batches(1), batch="var", sequence="mean")
    expected = reference(model, batch="var", sequence="mean")
    torch.testing.assert_close(scores.ffn.double(), expected["ffn"], rtol=1e-2, atol=1e-5)
    assert float(expected["ffn"].median()) < 1000


def test_hooks_are_gone_and_rows_of_padding_count_for_nothing() -> None:
    model = tiny_model()
    ids = torch.full((2, 6), 5)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    advanced: list[int] = []
    padded = measure(model, [{"input_ids": ids, "attention_mask": mask}], progress=advanced.append)
    alone = measure(model, [{"input_ids": ids[:1]}])
    torch.testing.assert_close(padded.ffn, alone.ffn)
    assert padded.about["rows"] == "1"
    assert advanced == [2]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(UserError, match="no tokens"):
        measure(model, [])


def test_activations_that_overflow_are_refused() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    with pytest.raises(UserError, match="not finite"):
        measure(model, batches(2))


def test_unknown_aggregation_and_family_are_refused() -> None:
    with pytest.raises(UserError, match="median"):
        measure(tiny_model(), [], batch="median")
    with pytest.raises(UserError, match="block size 4"):
        measure(tiny_model(), [], block_sizes=(4,))
    model = tiny_model()
    model.config.model_type = "gpt2"
    with pytest.raises(UserError, match=r"gpt2.*llama"):
        measure(model, [])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_removal_loss_equals_a_model_without_those_layers(model_type) -> None:
    model = tiny_model(model_type)
    advanced: list[int] = []
    blocks = [(0, 0), (1, 2), (1, 3), (0, 3)]
    losses = removal_loss(model, batches(2), blocks, progress=advanced.append)
    assert sum(advanced) == 3 * len(blocks)
    layers = list(model.model.layers)
    for (first, stop), loss in losses.items():
        model.model.layers = torch.nn.ModuleList(layers[:first] + layers[stop:])
        total, count = 0.0, 0
        with torch.inference_mode():
            for length in LENGTHS:
                if length > 1:
                    logits = model(input_ids=row(length)[None], use_cache=False).logits[0, :-1].double()
                    total += float(torch.nn.functional.cross_entropy(logits, row(length)[1:], reduction="sum"))
                    count += length - 1
        assert loss == pytest.approx(total / count, rel=1e-5)
        model.model.layers = torch.nn.ModuleList(layers)
    assert len(set(losses.values())) == len(blocks)


def test_removal_loss_predicts_only_labels_and_ignores_batching() -> None:
    model = tiny_model()
    plain = removal_loss(model, batches(1), [(1, 2)])
    for other in (batches(6, extra=4), batches(3, side="left")):
        assert removal_loss(model, other, [(1, 2)])[1, 2] == pytest.approx(plain[1, 2], rel=1e-5)
    batch = batches(6)[0]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :3] = -100
    some = removal_loss(model, [batch | {"labels": labels}], [(1, 2)])
    with skipped([model.model.layers[1]]), torch.inference_mode():
        expected = model(**batch, labels=labels, use_cache=False).loss
    assert some[1, 2] == pytest.approx(float(expected), rel=1e-5)
    assert some[1, 2] != pytest.approx(plain[1, 2], rel=1e-3)


def test_skipped_layers_come_back_even_after_an_error() -> None:
    model, ids = tiny_model(), row(14)[None]
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        with skipped(model.model.layers):
            assert not torch.equal(model(input_ids=ids, use_cache=False).logits, before)
        with pytest.raises(IndexError), skipped(model.model.layers):
            model(input_ids=torch.tensor([[9999]]))
        assert torch.equal(model(input_ids=ids).logits, before)


def test_candidates_keep_first_and_last() -> None:
    assert candidate_blocks(6, 2) == [(1, 3), (2, 4), (3, 5)]
    assert candidate_blocks(3, 1) == [(1, 2)]
    assert candidate_blocks(32, 16)[-1] == (15, 31)  # the block of the Minitron paper, 0-based


def test_removal_refuses_blocks_outside_and_empty_data() -> None:
    with pytest.raises(UserError, match="outside 3 layers"):
        removal_loss(tiny_model(), batches(1), [(2, 4)])
    with pytest.raises(UserError, match="no tokens to predict"):
        removal_loss(tiny_model(), [{"input_ids": torch.tensor([[5]])}], [(1, 2)])


def test_scores_survive_the_disk(tmp_path: Path) -> None:
    scores = measure(tiny_model(), batches(3), block_sizes=(2,), teacher="abc")
    scores.removal = {(1, 2): 3.25, (0, 1): 4.5}
    scores.save(tmp_path / "scores.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"]
    back = Scores.load(tmp_path / "scores.safetensors")
    for name in ("hidden", "ffn", "heads", "layers"):
        assert torch.equal(getattr(back, name), getattr(scores, name))
    assert torch.equal(back.blocks[2], scores.blocks[2])
    assert (back.removal, back.about) == (scores.removal, scores.about)
    assert (back.teacher, len(back.calibration)) == ("abc", 16)
    (tmp_path / "broken").write_bytes((tmp_path / "scores.safetensors").read_bytes()[:100])
    for name in ("broken", "absent"):
        with pytest.raises(UserError, match="cannot read scores"):
            Scores.load(tmp_path / name)


def test_random_scores_have_the_shapes_and_the_seed() -> None:
    shape = Shape.from_config(tiny_model().config)
    one, same, other = Scores.random(shape, 1), Scores.random(shape, 1), Scores.random(shape, 2)
    assert one.ffn.shape == (3, 80)
    assert one.heads.shape == (3, 6)
    assert torch.equal(one.hidden, same.hidden)
    assert not torch.equal(one.hidden, other.hidden)


def test_bf16_activations_are_summed_in_float32() -> None:
    """400 tokens in bf16: a bf16 sum would stop growing early; the scores stay within rounding."""
    model = tiny_model(max_position_embeddings=512)
    ids = torch.randint(3, 259, (1, 400), generator=torch.Generator().manual_seed(0))
    exact = measure(model, [{"input_ids": ids}])
    rounded = measure(model.bfloat16(), [{"input_ids": ids}])
    torch.testing.assert_close(rounded.ffn, exact.ffn, rtol=0.15, atol=1e-3)
    torch.testing.assert_close(rounded.hidden, exact.hidden, rtol=0.02, atol=1e-3)
