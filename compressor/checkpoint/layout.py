"""What a Hugging Face checkpoint folder holds: file names and the value types of safetensors."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# safetensors dtype -> (torch dtype, bytes per value); the floating types that weights can be sliced in
DTYPES = {"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}
# sizes of the other types that may lie beside them (droppable buffers), needed to check byte ranges
OTHER_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
