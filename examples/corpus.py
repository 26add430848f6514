"""Text in, blocks of tokens out: the data behind finetune.py.

Two corpora come with every Python: the source of the standard library (to pretrain on) and the
English of its language reference (to adapt to). Both are read as bytes, so they need no tokenizer
and no network. `text_dataset` does the same for any data set with a text column.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Not part of what a program imports (or huge tables). pydoc_data holds the English text that the
# models are adapted to, so pretraining must not see it.
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "lib2to3",
    "idlelib",
    "turtledemo",
    "encodings",
    "pydoc_data",
}
SECTION_PARAGRAPHS = 20  # about 4 kB of running text
HELD_OUT_EVERY = 8  # one section or block in eight is never trained on


@dataclass(frozen=True)
class Corpus:
    """Token blocks [count, block] to train on, and others to measure the loss on."""

    train: torch.Tensor
    held_out: torch.Tensor

    def to(self, device: str) -> Corpus:
        """Move both parts."""
        return Corpus(self.train.to(device), self.held_out.to(device))

    @property
    def description(self) -> str:
        """The sizes in words."""
        return f"{self.train.numel():,} tokens, {self.held_out.numel():,} held out"


def python_source(block: int, limit: int, held_out_blocks: int) -> Corpus:
    """Read the standard library's source files as bytes, in path order, up to `limit` bytes.

    Args:
        block: tokens per block.
        limit: how many bytes to read.
        held_out_blocks: how many blocks to keep for measuring.

    Returns:
        Every eighth block is held out; at most `held_out_blocks` of them are kept, evenly spread.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(root.rglob("*.py")):
        if len(text) >= limit:
            break
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            text += path.read_bytes()
    if not text:
        raise FileNotFoundError(f"no Python source files under {root}")
    blocks = to_blocks(torch.frombuffer(text[:limit], dtype=torch.uint8), block)
    is_held_out = torch.arange(len(blocks)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return Corpus(blocks[~is_held_out], spread(blocks[is_held_out], held_out_blocks))


def english_topics(block: int, held_out_blocks: int) -> Corpus:
    """Read the language reference that `help()` shows, as bytes.

    Topics quote each other, so a paragraph counts only where it is met first: what is held out
    never occurs in the part that is trained on.

    Args:
        block: tokens per block.
        held_out_blocks: how many blocks to keep for measuring.

    Returns:
        Every eighth section of 20 paragraphs is held out.
    """
    from pydoc_data.topics import topics

    paragraphs = list(
        dict.fromkeys(part for name in sorted(topics) for part in topics[name].split("\n\n"))
    )
    parts: dict[bool, list[str]] = {False: [], True: []}
    for start in range(0, len(paragraphs), SECTION_PARAGRAPHS):
        section = "\n\n".join(paragraphs[start : start + SECTION_PARAGRAPHS])
        number = start // SECTION_PARAGRAPHS
        parts[number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1].append(section)
    train, held_out = (
        to_blocks(torch.frombuffer(bytearray("\n\n".join(part), "utf-8"), dtype=torch.uint8), block)
        for part in (parts[False], parts[True])
    )
    return Corpus(train, spread(held_out, held_out_blocks))


def text_dataset(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    config: str | None,
    block: int,
    limit: int,
    held_out_blocks: int,
) -> Corpus:
    """Tokenize a data set of the hub, a local text file or a local folder into fixed blocks.

    Args:
        tokenizer: the model's own tokenizer.
        name: a name on the hub, a text file, or a folder that `datasets.load_dataset` can read.
        config: the configuration of a data set of the hub.
        block: tokens per block.
        limit: how many tokens to train on at most.
        held_out_blocks: how many blocks to measure on at most.

    Returns:
        The splits "train" and "validation" (or "test"); without one of these, every eighth block
        of "train" is held out.

    Raises:
        ValueError: no split "train" or no column "text"; the message names what there is.
    """
    from datasets import load_dataset

    if Path(name).is_file():
        splits = load_dataset("text", data_files=name)
    else:
        splits = load_dataset(name, config)
    if "train" not in splits or "text" not in splits["train"].column_names:
        columns = {split: rows.column_names for split, rows in splits.items()}
        raise ValueError(f"{name}: wants a split 'train' with a column 'text', found {columns}")
    train = to_blocks(tokenize(tokenizer, splits["train"]["text"], limit), block)
    for split in ("validation", "test"):
        if split in splits:
            held_out = tokenize(tokenizer, splits[split]["text"], held_out_blocks * block)
            return Corpus(train, to_blocks(held_out, block))
    is_held_out = torch.arange(len(train)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return Corpus(train[~is_held_out], spread(train[is_held_out], held_out_blocks))


def tokenize(tokenizer: PreTrainedTokenizerBase, lines: Iterable[str], limit: int) -> torch.Tensor:
    """Join the tokens of all lines into one row, up to `limit` tokens."""
    tokens: list[int] = []
    for line in lines:
        if len(tokens) >= limit:
            break
        # Some data sets keep the end of the line, others cut it off.
        text = line if line.endswith("\n") else line + "\n"
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(tokens[:limit])


def to_blocks(tokens: torch.Tensor, block: int) -> torch.Tensor:
    """Cut a row of tokens into blocks [count, block]; the incomplete last one is dropped."""
    count = len(tokens) // block
    if count < HELD_OUT_EVERY:
        raise ValueError(
            f"the text has {len(tokens)} tokens: too short for {HELD_OUT_EVERY} blocks of {block}"
        )
    return tokens[: count * block].view(count, block).long()


def spread(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """Pick at most `count` blocks, evenly spread."""
    picked = min(count, len(blocks))
    return blocks[torch.linspace(0, len(blocks) - 1, picked).round().long()]


def batches(blocks: torch.Tensor, size: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield `steps` batches [size, block]: shuffled passes, one after the other.

    The order depends on `seed` alone, so every method sees the same batches.
    """
    generator = torch.Generator().manual_seed(seed)
    passes = -(-steps * size // len(blocks))
    order = torch.cat([torch.randperm(len(blocks), generator=generator) for _ in range(passes)])
    for step in range(steps):
        yield blocks[order[step * size : (step + 1) * size]]
