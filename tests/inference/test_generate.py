"""Generation over the cache is generation without it, and its text is whole."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from tests.support import F64, random_model, random_tokens, tiny_config
from ziphius.config.errors import BadInput
from ziphius.config.model import Yarn
from ziphius.data.tokenizer import train_tokenizer
from ziphius.inference.generate import generate_text, generate_tokens
from ziphius.inference.params import SamplingParams
from ziphius.model.transformer import Transformer

MODELS: list[dict[str, Any]] = [
    {},
    {"q_lora_rank": None, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
    {"rope_scaling": Yarn(original_max_position_embeddings=8, factor=4.0)},
    {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0},
]
TEXT = "Zähle die Wale: 🐋🐳 鯨 нарвал, and whales are counted twice; whales dive. "


def generated(model: Transformer, prompt: list[int], **params: Any) -> list[int]:
    """Generate greedily unless a temperature is given."""
    cached, stop = params.pop("cached", True), params.pop("stop_ids", ())
    settings_ = SamplingParams(**{"temperature": 0} | params)
    return list(generate_tokens(model, prompt, settings_, stop, cached=cached))


def prompts(model: Transformer) -> list[list[int]]:
    return [random_tokens(model.config, 1, n, seed=n)[0].tolist() for n in (1, 2, 9)]


# --- with the cache and without -------------------------------------------------------------------


@pytest.mark.parametrize("changes", MODELS)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}])
def test_cached_generation_equals_the_slow_one(changes: dict[str, Any], sampling: Any) -> None:
    model = random_model(precision=F64, **changes)
    answers = []
    for prompt in prompts(model):
        fast = generated(model, prompt, max_tokens=12, **sampling)
        assert fast == generated(model, prompt, max_tokens=12, cached=False, **sampling)
        assert len(fast) == 12
        answers.append(tuple(fast))
    assert len(set(answers)) > 1, "the model ignores its prompt"


def test_greedy_generation_takes_the_largest_logit_each_time() -> None:
    model, prompt = random_model(precision=F64), [5, 17, 3]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert generated(model, prompt, max_tokens=6) == ids[3:]


def test_a_cached_step_feeds_the_new_token_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, fed = random_model(), []
    trunk = Transformer.trunk

    def watched(self: Transformer, tokens_BT: torch.Tensor, cache: Any = None) -> Any:
        before = cache.length
        result = trunk(self, tokens_BT, cache)
        fed.append((before, tokens_BT.shape[1], cache.length))
        return result

    monkeypatch.setattr(Transformer, "trunk", watched)
    generated(model, [1, 2, 3, 4], max_tokens=4)
    assert fed == [(0, 4, 4), (4, 1, 5), (5, 1, 6), (6, 1, 7)]


def test_a_seed_repeats_and_does_not_touch_the_global_generator() -> None:
    model = random_model()
    sampling = {"max_tokens": 20, "temperature": 2.0}
    state = torch.get_rng_state()
    first = generated(model, [7], seed=1, **sampling)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert generated(model, [7], seed=1, **sampling) == first
    assert generated(model, [7], seed=2, **sampling) != first


def test_two_generations_interleaved_do_not_disturb_each_other() -> None:
    model = random_model()
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=3)
    alone = [list(generate_tokens(model, [i], params)) for i in (1, 2)]
    together = zip(*(generate_tokens(model, [i], params) for i in (1, 2)), strict=True)
    assert [list(ids) for ids in zip(*together, strict=True)] == alone


def test_the_consumer_keeps_its_own_gradient_mode() -> None:
    for _ in generate_tokens(random_model(), [1], SamplingParams(max_tokens=2)):
        assert torch.is_grad_enabled()


# --- where it ends --------------------------------------------------------------------------------


def test_a_stop_id_is_the_last_token() -> None:
    model = random_model()
    whole = generated(model, [7], max_tokens=20)
    stop = whole[6]
    until = whole[: whole.index(stop) + 1]
    assert generated(model, [7], max_tokens=20, stop_ids={stop}) == until
    assert generated(model, [7], max_tokens=20, stop_token_ids=[stop]) == until
    assert generated(model, [7], max_tokens=20, stop_ids={whole[0]}) == whole[:1]
    assert generated(model, [7], max_tokens=20, stop_ids={stop}, ignore_eos=True) == whole


def test_the_context_ends_the_answer() -> None:
    model = random_model(max_position_embeddings=16)
    prompt = random_tokens(model.config, 1, 12)[0].tolist()
    assert len(generated(model, prompt, max_tokens=50)) == 4
    assert len(generated(model, [*prompt, 1, 2, 3], max_tokens=50)) == 1
    assert len(generated(model, prompt, max_tokens=None)) == 4


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([], "the prompt is empty"),
        ([1, 61], "token id 61 is outside the model's vocabulary of 61"),
        ([1, -1], "token id -1 is outside the model's vocabulary of 61"),
        ([1] * 16, "the prompt has 16 tokens and the model's context 16"),
        ([1] * 40, "the prompt has 40 tokens and the model's context 16"),
    ],
)
def test_bad_prompts(prompt: list[int], expected: str) -> None:
    model = random_model(max_position_embeddings=16)
    with pytest.raises(BadInput, match=expected):
        generated(model, prompt)


# --- text -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Train a tokenizer that leaves most characters in more than one token."""
    return train_tokenizer([TEXT * 3], 330)


def test_generated_text(tokenizer: Tokenizer) -> None:
    """The prompt's tokens come after the first ids, and the pieces are the new tokens' text."""
    model = random_model(tiny_config(vocab_size=330))
    params = SamplingParams(max_tokens=15, seed=2, skip_special_tokens=False)
    pieces = generate_text(model, tokenizer, "whales", params, first_ids=[0])
    ids = [0, *tokenizer.encode("whales", add_special_tokens=False).ids]
    tokens = generate_tokens(model, ids, params)
    assert "".join(pieces) == tokenizer.decode(list(tokens), skip_special_tokens=False)
    other = generate_text(model, tokenizer, "whales", params, first_ids=[1])
    assert "".join(other) != tokenizer.decode(ids, skip_special_tokens=False)


def test_generated_text_ends_where_it_should(tokenizer: Tokenizer) -> None:
    model = random_model(tiny_config(vocab_size=330, max_position_embeddings=32))
    params = {"max_tokens": None, "seed": 4}
    whole = "".join(generate_text(model, tokenizer, "whales", SamplingParams(**params)))
    stop = whole[len(whole) // 2]
    stopped = SamplingParams(stop=stop, **params)
    assert "".join(generate_text(model, tokenizer, "whales", stopped)) == whole.split(stop)[0]
    without = SamplingParams(bad_words=[stop], **params)
    assert stop not in "".join(generate_text(model, tokenizer, "whales", without))


@pytest.mark.parametrize(
    "params", [{"n": 2}, {"logprobs": 1}, {"prompt_logprobs": 0}, {"regex": "a"}]
)
def test_what_only_the_engine_does_is_refused(params: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="are the engine's"):
        generated(random_model(), [1], **params)


def test_a_token_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(BadInput, match="outside the model's vocabulary of 61"):
        generated(random_model(), [1], banned_token_ids=[61])


def test_without_a_seed_answers_differ() -> None:
    model = random_model()
    answers = {tuple(generated(model, [1], temperature=5.0)) for _ in range(4)}
    assert len(answers) == 4


def test_an_empty_text_needs_a_first_token(tokenizer: Tokenizer) -> None:
    model = random_model(tiny_config(vocab_size=330))
    params = SamplingParams(max_tokens=2)
    with pytest.raises(BadInput, match="empty"):
        list(generate_text(model, tokenizer, "", params))
    assert list(itertools.islice(generate_text(model, tokenizer, "", params, first_ids=[0]), 1))


def test_a_long_prompt_in_chunks_gives_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(precision=F64)
    prompt = random_tokens(model.config, 1, 23)[0].tolist()
    whole = generated(model, prompt, max_tokens=10, cached=False)
    for chunk in (1, 5, 22, 23, 24):
        monkeypatch.setattr("ziphius.inference.generate.PREFILL_CHUNK", chunk)
        assert generated(model, prompt, max_tokens=10) == whole
