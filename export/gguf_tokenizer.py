"""The tokenizer in a GGUF file: its metadata from tokenizer.json, and the tokenizer that llama.cpp makes of them.

llama.cpp has two kinds that models here use: `gpt2`, byte-level BPE with merges, whose text is split first by regular
expressions that only go by a name (`tokenizer.ggml.pre`); and `llama`, SentencePiece, which joins the pair of highest
score. The name is found by trying: the one whose split gives the teacher's token ids on every probe.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compressor.checkpoint import load_tokenizer
from compressor.errors import UserError

from .probes import TEXTS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"  # SentencePiece's mark of a space

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WHOLE_FIRST = ("llama-bpe", "tekken")  # a piece that is a token is one, however its merges would go
# name in llama.cpp -> the expressions its text is split by, one after another
PRE: dict[str, tuple[str, ...]] = {
    "llama-bpe": (rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",),
    "qwen2": (rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",),
    "tekken": (_TEKKEN,),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "deepseek-llm": (
        r"[\r\n]",
        r"\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373]+",
        r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}+",
    ),
}


def tokenizer_fields(student: Path, vocab: int, *, pre: str | None = None) -> dict[str, Any]:
    """The tokenizer.* metadata for a model of `vocab` ids; `pre` names llama.cpp's splitting rule instead of a search.

    Raises UserError for a tokenizer of another kind than BPE, and for an unknown `pre`.
    """
    tokenizer = load_tokenizer(student)
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    if core["model"]["type"] != "BPE":
        raise UserError(
            f"the tokenizer is of the kind {core['model']['type']}; expected byte-level BPE or SentencePiece BPE, "
            "which llama.cpp has; export to onnx instead"
        )
    spm = bool(core["model"].get("byte_fallback"))
    fields: dict[str, Any] = {"tokenizer.ggml.model": "llama" if spm else "gpt2"}
    tokens, types = _tokens(core, vocab, unknown=tokenizer.unk_token_id)
    fields |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in core["model"]["merges"]]
    if spm:
        ranks = {merge.replace(" ", "", 1): rank for rank, merge in reversed(list(enumerate(merges)))}
        # the best score is joined first; what no merge makes must come last
        fields["tokenizer.ggml.scores"] = [float(-ranks.get(token, len(merges))) for token in tokens]
        fields["tokenizer.ggml.add_space_prefix"] = _adds_space(tokenizer)
        if pre is not None:
            raise UserError("a SentencePiece tokenizer has no splitting rule; expected none; leave --tokenizer-pre out")
    else:
        if not merges:
            raise UserError("the tokenizer has no merges, and llama.cpp loads none without; export to onnx instead")
        fields["tokenizer.ggml.merges"] = merges
        fields["tokenizer.ggml.pre"] = pre or nearest_pre(tokenizer)
    special = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for name, ours in special.items():
        if (token_id := getattr(tokenizer, f"{ours}_token_id")) is not None:
            fields[f"tokenizer.ggml.{name}_token_id"] = token_id
    plain, dressed = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    fields["tokenizer.ggml.add_bos_token"] = dressed[: -len(plain)] == [tokenizer.bos_token_id]
    fields["tokenizer.ggml.add_eos_token"] = dressed[len(plain) :] == [tokenizer.eos_token_id]
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    if template:
        fields["tokenizer.chat_template"] = template
    return fields


def _tokens(core: dict[str, Any], vocab: int, *, unknown: int | None) -> tuple[list[str], list[int]]:
    """Every id's text and type. Ids without a text are [PADi], unused; texts beyond the model's ids are left out."""
    texts = {token_id: text for text, token_id in core["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, NORMAL)
    if core["model"].get("byte_fallback"):
        kinds |= {i: BYTE for i, text in texts.items() if len(text) == 6 and text.startswith("<0x")}
    for added in core["added_tokens"]:
        texts[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if unknown is not None and core["model"].get("byte_fallback"):
        kinds[unknown] = UNKNOWN
    return [texts.get(i, f"[PAD{i}]") for i in range(vocab)], [kinds.get(i, UNUSED) for i in range(vocab)]


def _adds_space(tokenizer: Any) -> bool:
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]
    return first.startswith(SPACE)


def nearest_pre(tokenizer: Any) -> str:
    """The name whose splitting gives the same ids on the most probes; verification tells where it is not all."""
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    core = tokenizer.backend_tokenizer.to_str()

    def same(name: str) -> int:
        other = _split_by(core, name)
        return sum(
            other.encode(text, add_special_tokens=False).ids == ids for text, ids in zip(TEXTS, wanted, strict=True)
        )

    return max(PRE, key=same)


def _split_by(core: str, rule: str) -> Any:
    """The tokenizer of a tokenizer.json with one of llama.cpp's rules in the place of its own."""
    from tokenizers import Tokenizer

    state = json.loads(core)
    state["model"]["ignore_merges"] = rule in WHOLE_FIRST
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.pre_tokenizer = _splitter(rule)
    return tokenizer


def _splitter(rule: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    steps = [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in PRE[rule]]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*steps, level])


def rebuilt(fields: dict[str, Any]) -> Any:
    """A `tokenizers.Tokenizer` that splits and merges as llama.cpp does with these metadata of a file."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    if fields["tokenizer.ggml.model"] == "llama":
        scores = fields["tokenizer.ggml.scores"]
        joined = sorted((i for i, kind in enumerate(types) if kind == NORMAL), key=lambda i: -scores[i])
        merges = [
            (token[:cut], token[cut:])
            for token in (tokens[i] for i in joined)
            for cut in range(1, len(token))
            if token[:cut] in vocab and token[cut:] in vocab
        ]
        unknown = tokens[types.index(UNKNOWN)] if UNKNOWN in types else None
        model = models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token=unknown, fuse_unk=True)
        tokenizer = Tokenizer(model)
        # a space before the text and after every special token, also where the text begins with one
        before = [normalizers.Prepend(SPACE)] if fields["tokenizer.ggml.add_space_prefix"] else []
        tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    else:
        pairs = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
        rule = fields["tokenizer.ggml.pre"]
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=rule in WHOLE_FIRST))
        tokenizer.pre_tokenizer = _splitter(rule)
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, USER_DEFINED, UNKNOWN):  # looked for in the text before it is split
            tokenizer.add_tokens([AddedToken(token, special=kind != USER_DEFINED, normalized=False)])
    return tokenizer
