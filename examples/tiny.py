"""A language model, a tokenizer and texts that need no download, shared by the examples.

With a network, take ``AutoModelForCausalLM.from_pretrained(name)`` and a data set of your own: the
lines that concern LoFT stay the same.
"""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = (
    *("the", "a", "and", "then", "red", "green", "blue", "small", "big"),
    *("cat", "dog", "bird", "sees", "hears", "likes", "runs", "sits"),
)
LENGTH = 16


def tiny_model(seed: int = 0) -> transformers.PreTrainedModel:
    """Make a Llama of two layers with random weights."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.1,  # wider than usual: nothing but the adapters learns
    )
    return transformers.LlamaForCausalLM(config)


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Make a tokenizer of a few words."""
    vocabulary = {word: k for k, word in enumerate(["<pad>", "<end>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<end>"
    )


def tiny_texts(count: int = 64, seed: int = 0) -> list[str]:
    """Make sentences of a small grammar, which a model can learn."""
    gen = torch.Generator().manual_seed(seed)

    def pick(*words: str) -> str:
        return words[int(torch.randint(len(words), (), generator=gen))]

    def thing() -> str:
        adjective, noun = pick("red", "green", "blue", "small", "big"), pick("cat", "dog", "bird")
        return f"{pick('the', 'a')} {adjective} {noun}"

    return [
        f"{thing()} {pick('sees', 'hears', 'likes')} {thing()} and then {pick('runs', 'sits')}"
        for _ in range(count)
    ]


class TinyDataset(torch.utils.data.Dataset):
    """The sentences as rows of token ids, in the form that causal language models train on."""

    def __init__(self, count: int = 64, seed: int = 0) -> None:
        """Encode and pad the sentences."""
        rows = tiny_tokenizer()(
            tiny_texts(count, seed), padding="max_length", max_length=LENGTH, return_tensors="pt"
        )
        self.ids = rows["input_ids"]
        self.mask = rows["attention_mask"]

    def __len__(self) -> int:
        """Count the sentences."""
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one sentence; padding does not count in the loss."""
        ids, mask = self.ids[index], self.mask[index]
        labels = torch.where(mask.bool(), ids, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
