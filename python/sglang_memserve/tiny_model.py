"""``python -m sglang_memserve.tiny_model DIR``: a tiny random llama for tests that need no quality.

Needs no network and no other package than the engine's. The weights are a function of the seed.
They are drawn wider than a fresh model's, so that greedy output varies with the prompt and
comparing two outputs means something.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .demo_model import is_complete, run_command, write_atomically

SEED = 20240601
CONTEXT_TOKENS = 8192

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def make_tiny_model(folder: Path, seed: int = SEED) -> None:
    """Make ``folder`` unless it is there. Takes a few seconds and 1 MB."""
    if not is_complete(folder):
        write_atomically(folder, lambda draft: _write(draft, seed))


def _write(draft: Path, seed: int) -> None:
    vocabulary = _write_tokenizer(draft)
    _write_weights(draft, vocabulary, seed)


def _write_tokenizer(draft: Path) -> int:
    """A byte-level tokenizer, one token a byte, with a chat template. Returns its size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {symbol: index for index, symbol in enumerate((*_SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in _SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_SPECIAL[1],
        eos_token=_SPECIAL[2],
        pad_token=_SPECIAL[0],
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _CHAT_TEMPLATE
    fast.save_pretrained(draft)
    return len(ids)


def _write_weights(draft: Path, vocabulary: int, seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                continue
            scale = 1.0 if "embed_tokens" in name else 1.6 / parameter.shape[-1] ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.bfloat16().save_pretrained(draft)


def main() -> int:
    return run_command(sys.argv[1:], "Make a tiny random llama for tests.", make_tiny_model)


if __name__ == "__main__":
    sys.exit(main())
