"""Byte-level BPE with DeepSeek-V3's pre-tokeniser and special tokens (facts 6.1)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from ziphius.checkpoint.files import write_atomic
from ziphius.checkpoint.folder import TOKENIZER_FILE
from ziphius.config.errors import BadInput, in_one_line

BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
# The bars are U+FF5C and the low blocks U+2581, not ASCII.
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"  # noqa: RUF001
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"  # noqa: RUF001
USER, ASSISTANT, EOT = "<｜User｜>", "<｜Assistant｜>", "<|EOT|>"  # noqa: RUF001
TOOL_TOKENS = (
    *(
        f"<｜tool▁{part}▁{edge}｜>"  # noqa: RUF001
        for part in ("calls", "call", "outputs", "output")
        for edge in ("begin", "end")
    ),
    "<｜tool▁sep｜>",  # noqa: RUF001
)
THINK, END_THINK = "<think>", "</think>"

# In the order of their ids. Those of CONTROL are left out of decoded text; the others are
# ordinary text that one token stands for, as in the published tokenizer.
SPECIAL_TOKENS = (
    *(BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT, EOT),
    *TOOL_TOKENS,
    *(THINK, END_THINK),
)
CONTROL = frozenset({BOS, EOS, PAD, EOT})

CONFIG_FILE = "tokenizer_config.json"

PUNCTUATION = r" ?[\p{P}\p{S}]+"

_DIGITS = r"\p{N}{1,3}"
_CJK = "[\u3040-\u30ff\u4e00-\u9fa5]+"
_WORDS = "|".join(
    (
        r"[!-/:-@\[-`{-~][A-Za-z]+",  # one ASCII punctuation mark, then ASCII letters
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",  # a word, with the blank before it
        rf"{PUNCTUATION}[\r\n]*",  # punctuation with the line breaks after it: new in V3
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # leaves the last blank to the word that follows
        r"\s+",
    )
)


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Return V3's pre-tokeniser: digits by three, CJK runs, words and punctuation, then bytes."""
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in (_DIGITS, _CJK, _WORDS)]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, byte_level])


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on ``texts``; equal counts of words give equal tokenizers.

    ``vocab_size`` counts the special tokens and the 256 bytes. A text with too few pairs to merge
    gives fewer tokens than that, which leaves the model's last embedding rows unused.
    Raises BadInput for a ``vocab_size`` without room for the special tokens and the bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise BadInput(
            f"tokenizer.vocab_size = {vocab_size} has no room for the {len(alphabet)} bytes and "
            f"the {len(SPECIAL_TOKENS)} special tokens: use at least {smallest}"
        )
    scratch = Tokenizer(models.BPE())
    scratch.pre_tokenizer = pre_tokenizer()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    scratch.train_from_iterator(texts, trainer)
    return _assemble(json.loads(scratch.to_str())["model"])


def _assemble(model: dict[str, object]) -> Tokenizer:
    """Put a trained BPE model into a tokenizer.

    The trainer marks every special token as control; only a fresh tokenizer can say otherwise.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    whole = json.loads(tokenizer.to_str())
    whole["model"] = model
    tokenizer = Tokenizer.from_str(json.dumps(whole, ensure_ascii=False))
    tokenizer.add_tokens(
        [AddedToken(t, special=t in CONTROL, normalized=False) for t in SPECIAL_TOKENS]
    )
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a ``tokenizer.json``, or the one in the folder ``path``.

    Truncation and padding stored in the file are switched off.
    Raises BadInput for a file that is missing, corrupt, not byte-level, or without V3's special
    tokens at ids 0, 1 and 2.
    """
    file = path / TOKENIZER_FILE if path.is_dir() else path
    tokenizer = read_tokenizer(file)
    _require_v3(tokenizer, file)
    return tokenizer


def read_tokenizer(file: Path) -> Tokenizer:
    """Read any ``tokenizer.json``, with truncation and padding switched off.

    Raises BadInput for a file that is missing or corrupt.
    """
    if not file.is_file():
        raise BadInput(f"tokenizer {file}: no {TOKENIZER_FILE} found: give the file or its folder")
    try:
        tokenizer = Tokenizer.from_str(file.read_text("utf-8"))
    except Exception as error:  # the library raises nothing more precise
        raise BadInput(
            f"tokenizer {file}: cannot be read as a tokenizer: {in_one_line(error)}"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _require_v3(tokenizer: Tokenizer, file: Path) -> None:
    for token, needed in ((BOS, BOS_ID), (EOS, EOS_ID), (PAD, PAD_ID)):
        found = tokenizer.token_to_id(token)
        if found != needed:
            raise BadInput(
                f"tokenizer {file}: {token} has id {found}, not {needed}: "
                "give a tokenizer of the DeepSeek-V3 family"
            )
    if not tokenizer.get_vocab(with_added_tokens=False).keys() >= set(
        pre_tokenizers.ByteLevel.alphabet()
    ):
        raise BadInput(f"tokenizer {file}: some bytes have no token: give a byte-level tokenizer")


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, which transformers opens."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / TOKENIZER_FILE, tokenizer.to_str(pretty=True).encode())
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    write_atomic(folder / CONFIG_FILE, text.encode())


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Return, by id, how many UTF-8 bytes of text a token stands for; control tokens count 0.

    The sum over the ids of a text is the text's size in bytes, which is what bits per byte needs.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for piece, index in vocabulary.items():
        sizes[index] = len(piece)  # byte level: one character of a piece is one byte
    for index, added in tokenizer.get_added_tokens_decoder().items():
        sizes[index] = 0 if added.special else len(added.content.encode())
    return sizes


def plain_text_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy that reads special tokens spelt out in a text as ordinary characters.

    So no document can end itself, start another one, or pass for a dialogue or a filled gap. All of
    ``SPECIAL_TOKENS`` are meant, and what else the tokenizer marks as special. Truncation and
    padding are off. Decode with ``skip_special_tokens=False``.
    """
    whole = json.loads(tokenizer.to_str())
    for added in whole["added_tokens"]:
        # The switch below is for tokens with this mark only.
        added["special"] = added["special"] or added["content"] in SPECIAL_TOKENS
    copy = Tokenizer.from_str(json.dumps(whole))
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy
