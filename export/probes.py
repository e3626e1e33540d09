"""Text that tokenizers and chat templates stumble over, and conversations that hold it."""

TEXTS = (
    "",
    "Hello, world! It's a plain sentence, isn't it?",
    "I'LL WE'RE they've O'Brien don't",
    "  two leading, two  inside, two trailing  ",
    "a\tb\t\tc\n\n  d\r\ne\n",
    "\u00e9 e\u0301 \ufb01 na\u00efve \u00df \u0130 \u00a0\u200b|",
    "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea ok",
    "\u4e2d\u6587\u5b57\u7b26\uff0c\u6d4b\u8bd5\u3002 \u65e5\u672c\u8a9e\u306e\u6587 \ud55c\uad6d\uc5b4",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea \u0939\u093f\u0928\u094d\u0926\u0940",
    "0 12 345 6789 1234567.89e-10 3,14 [1] [12]",
    "def f(x_1, y=2):\n    return x_1 ** y  # snake_case, {'k': [1, 2]}",
    '{"name": "get_weather", "arguments": {"city": "Bonn", "days": 3}}',
    "https://example.com/a?b=c&d=%20e#f user@example.com C:\\dir\\file",
    "<|user|> <s></s> <unk> <pad> [INST] <|im_start|>system <|endoftext|> <think>",
    "....,,,;;; ---===+++ ((([[[{{{ '''\"\"\" ```",
    "x" * 10_000,
    "word " * 2_000,
)

CONVERSATIONS: tuple[dict, ...] = (
    {"messages": [{"role": "user", "content": "Hi"}]},
    {"messages": [{"role": "user", "content": ""}]},
    {
        "messages": [
            {"role": "user", "content": "  <s>\t\U0001f600 </s>\n"},
            {"role": "assistant", "content": "\u4e2d\u6587"},
            {"role": "user", "content": "go on"},
        ]
    },
)
