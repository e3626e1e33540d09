"""Tiny real models and tokenizers, built from configs: no square weight matrix, so a swapped axis fails."""

from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<pad>"]


def tiny_tokenizer():
    """A byte-level tokenizer of 259 ids: <s>, </s>, <pad>, then one id per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(model_type: str = "llama", **overrides: Any):
    """3 layers, hidden 48, 6 heads x head_dim 16 = 96, 2 KV heads = 32, ffn 80, vocab 259."""
    from transformers import AutoConfig

    sizes: dict[str, Any] = {
        "num_hidden_layers": 3,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 259,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "use_sliding_window": False,
    }
    if model_type not in ("qwen2", "qwen3"):
        sizes.pop("use_sliding_window")
    return AutoConfig.for_model(model_type, **(sizes | overrides))


def tiny_model(model_type: str = "llama", *, seed: int = 0, **overrides: Any):
    """A random model in float32, eval mode; norms and biases are randomised too, so that slicing them shows."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "embed" in name else 0.15))
    return model.eval()


def save_tiny(folder: Path, model_type: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """Save a tiny model and its tokenizer as a Hugging Face folder and return the folder."""
    model = tiny_model(model_type, seed=seed, **overrides)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)
