"""Models small enough to be made in milliseconds: one random decoder per attention design, and a tokenizer to go with them."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 512
HIDDEN = 64
WINDOW_TOKENS = 48
PAD, BOS, EOS, START, END = "<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"
SPECIAL = (PAD, BOS, EOS, START, END)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# What each family is here for is the comment beside it; (query heads, KV heads, head_dim) come first.
DESIGNS: dict[str, tuple[str, int, int, int]] = {
    "llama": ("llama", 4, 2, 16),  # GQA
    "mqa": ("llama", 4, 1, 16),  # one KV head
    "qwen2": ("qwen2", 4, 2, 16),  # biases in q, k, v; a window in the config that is switched off
    "qwen3": ("qwen3", 4, 2, 24),  # q/k norm; head_dim is not hidden / heads
    "mistral": ("mistral", 4, 2, 16),  # its own window in every layer
    "gemma2": ("gemma2", 4, 2, 16),  # soft-capped logits; own window in every other layer
    "gemma3": ("gemma3_text", 4, 2, 24),  # q/k norm; own window in every other layer, with its own rotary base
    "phi3": ("phi3", 4, 2, 16),  # one fused qkv projection
    "olmo2": ("olmo2", 4, 4, 16),  # MHA; q/k norm over all heads at once
    "gpt_oss": ("gpt_oss", 4, 2, 16),  # a sink logit per query head; own window in every other layer; experts
    "gpt_neox": ("gpt_neox", 4, 4, 16),  # MHA; parallel residual, rotary on part of head_dim
}
FAMILIES = tuple(DESIGNS)


def random_tokens(rows: int, n_tokens: int, seed: int = 0) -> torch.Tensor:
    """Tokens without the special ones: int64 (rows, n_tokens)."""
    return torch.randint(len(SPECIAL), VOCABULARY, (rows, n_tokens), generator=torch.Generator().manual_seed(seed))


def tiny_model(
    family: str, *, layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0, max_length: int = 512, **overrides: Any
) -> PreTrainedModel:
    """A random decoder of `family` with a vocabulary of 512; `overrides` are config attributes."""
    model_type, query_heads, kv_heads, head_dim = DESIGNS[family]
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": query_heads,
        "max_position_embeddings": max_length,
        # The usual 0.02 gives attention so even that a test could not tell one mask from another.
        "initializer_range": 0.15,
        "pad_token_id": SPECIAL.index(PAD),
        "bos_token_id": SPECIAL.index(BOS),
        "eos_token_id": SPECIAL.index(EOS),
    }
    heads = {} if family == "gpt_neox" else {"num_key_value_heads": kv_heads, "head_dim": head_dim}
    if family == "phi3":
        heads.pop("head_dim")
    config = CONFIG_MAPPING[model_type](**{**shared, **heads, **_own(family, layers, head_dim), **overrides})
    # The caller's random numbers stay where they were.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Grouped matrix products of experts know no double precision.
        experts = {"experts_implementation": "eager"} if hasattr(config, "num_experts_per_tok") else {}
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **experts)
        for name, parameter in model.named_parameters():
            if name.endswith(".sinks"):
                # Large enough to take a good part of a row's weight.
                torch.nn.init.normal_(parameter, mean=1.0)
    return model.eval().requires_grad_(False)


def _own(family: str, layers: int, head_dim: int) -> dict[str, Any]:
    alternating = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
    own: dict[str, dict[str, Any]] = {
        "qwen2": {"sliding_window": WINDOW_TOKENS, "use_sliding_window": False},
        "mistral": {"sliding_window": WINDOW_TOKENS},
        "gemma2": {
            "sliding_window": WINDOW_TOKENS,
            "layer_types": alternating,
            "query_pre_attn_scalar": head_dim,
            # Low enough to bend the logits of so small a model.
            "attn_logit_softcapping": 2.0,
        },
        "gemma3": {"sliding_window": WINDOW_TOKENS, "layer_types": alternating, "query_pre_attn_scalar": head_dim},
        "gpt_oss": {
            "sliding_window": WINDOW_TOKENS,
            "layer_types": alternating,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    }
    return own.get(family, {})


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (one token per byte, 5 special tokens), with a chat template unless it is None."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS, additional_special_tokens=[START, END],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = chat_template
    return tokenizer
