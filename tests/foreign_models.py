"""Tiny random models of each family as transformers makes them, saved as the folders that people download.

theirs = save_foreign("qwen2", folder)       # the transformers model whose weights lie in `folder`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.model_helpers import ROPE_LLAMA3

VOCAB = 320
BEGIN, END_OF_TEXT, END_OF_TURN = "<|begin_of_text|>", "<|endoftext|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ROPE_KEYS = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# Family -> (model class, its config's keys). Between them: tied and free heads, grouped and single key/value heads,
# every bias, both rope scalings, a head_dim of its own.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}),
    "llama2": ("LlamaForCausalLM", {**_ROPE_KEYS, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama-linear": (
        "LlamaForCausalLM",
        {**_ROPE_KEYS, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}},
    ),
    "llama3": ("LlamaForCausalLM", {**_ROPE_KEYS, "rope_parameters": {**ROPE_LLAMA3, "rope_theta": 500_000.0}}),
    "llama-biases": ("LlamaForCausalLM", {**_ROPE_KEYS, "attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "smollm2": (
        "LlamaForCausalLM",
        {**_ROPE_KEYS, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    ),
    "mistral": ("MistralForCausalLM", {**_ROPE_KEYS, "num_key_value_heads": 1, "sliding_window": None}),
    "qwen2": (
        "Qwen2ForCausalLM",
        {**_ROPE_KEYS, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen3": ("Qwen3ForCausalLM", {**_ROPE_KEYS, "head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-biases": ("Qwen3ForCausalLM", {**_ROPE_KEYS, "head_dim": 16, "attention_bias": True}),
}


def make_foreign(family: str, seed: int = 0, **changes: Any) -> Any:
    """The transformers model of that family, fp32, in evaluation mode; `changes` replace keys of its config.

    Every norm and bias is moved away from its initial value, and every weight is large enough to be seen in the logits.
    """
    import transformers

    class_name, keys = FAMILIES[family]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**{**keys, "bos_token_id": 1, "eos_token_id": 0, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_tokenizer(
    bos: bool = False, chat_template: str | None = CHATML, vocab_size: int = VOCAB, qwen: bool = False
) -> Any:
    """A byte-level BPE as transformers holds it: ids 0 end of text, 1 begin of text, 2 and 3 the turns of ChatML.

    With `bos`, every text that it encodes for a model begins with id 1, as in Llama 3. With `qwen`, text is normalized
    and split as by Qwen's tokenizers, which transformers assumes of any folder of Qwen2.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if qwen:
        split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, BEGIN, "<|im_start|>", END_OF_TURN]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([(Path(__file__).parent / "foreign_models.py").read_text("utf-8")], trainer)
    assert backend.get_vocab_size() == vocab_size
    if bos:
        backend.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BEGIN if bos else None,
        eos_token=END_OF_TEXT if chat_template is None else END_OF_TURN,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def save_foreign(family: str, folder: Path, seed: int = 0, bos: bool = False, **changes: Any) -> Any:
    """`make_foreign`'s model, saved with a tokenizer into `folder`; returns the model. It stops at ids 3 and 0."""
    model = make_foreign(family, seed, **changes)
    model.generation_config.eos_token_id = [0, 3]
    model.save_pretrained(folder)
    make_tokenizer(bos, vocab_size=model.config.vocab_size, qwen=family.startswith("qwen")).save_pretrained(folder)
    return model


def random_ids(batch_size: int = 2, length: int = 24, seed: int = 1, vocab_size: int = VOCAB) -> torch.Tensor:
    """Token ids (batch_size, length)."""
    return torch.randint(vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(seed))
