"""Small tokenizers of both common kinds, built in the test."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = "hello world, hello tokens! naïve café 你好 😀"


@cache
def byte_level_json() -> bytes:
    """Byte-level BPE as in GPT-2 and OPT; every byte has a token, ``</s>`` is special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return tokenizer.to_str().encode()


@cache
def sentencepiece_json() -> bytes:
    """Words with a leading mark for the space and byte fallback, as in Llama."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words += ["▁hello", "▁world", "▁", "hello", "!", "é"]
    vocab = {word: i for i, word in enumerate(words)}
    model = models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in words[:3]])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer.to_str().encode()
