"""A trained model as a reward: where its score is read, of which part, after what reasoning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tests.alignment.rewards.support import respond
from tests.support import F32, open_in_transformers, random_model
from ziphius.alignment.rewards.compose import Composed, Weighted
from ziphius.alignment.rewards.find import find_rewards
from ziphius.alignment.rewards.model import ModelReward, model_reward
from ziphius.alignment.rewards.pairs import Pair, by_grade, score_pairs
from ziphius.alignment.tasks.mixture import Mixture
from ziphius.checkpoint.huggingface import save
from ziphius.config.errors import BadInput
from ziphius.data.tokenizer import EOS, save_tokenizer, train_tokenizer
from ziphius.inference.chat import ChatTemplate
from ziphius.model.transformer import Transformer

THOUGHT = "<think>how are you</think>fine, thanks"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["how are you", "fine, thanks", "and then"], 300)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(precision=F32, vocab_size=300, num_labels=1).eval()


@pytest.fixture(scope="module")
def checkpoint(
    model: Transformer, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("judge") / "checkpoint"
    save(model, folder)
    save_tokenizer(tokenizer, folder)
    return folder


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def by_hand(model: Transformer, tokens: list[int]) -> float:
    with torch.no_grad():
        hidden_BTD, _ = model.trunk(torch.tensor([tokens]))
    return (hidden_BTD[0, -1] @ model.score.weight[0]).item()


def test_the_score_is_read_at_the_end_of_the_answer(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    prompt = ChatTemplate(format="v3.1").render([{"role": "user", "content": "question"}])
    tokens = [*ids(tokenizer, prompt), *ids(tokenizer, f"fine{EOS}")]
    assert ModelReward(model, tokenizer)(respond("fine")) == pytest.approx(by_hand(model, tokens))


def test_a_response_that_thinks_is_as_the_model_would_have_written_it(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    template = ChatTemplate(format="v3.1")
    prompt = template.render([{"role": "user", "content": "question"}], thinking=True)
    said = THOUGHT.removeprefix("<think>") + EOS
    assert prompt.endswith("<think>")
    tokens = [*ids(tokenizer, prompt), *ids(tokenizer, said)]
    found = ModelReward(model, tokenizer)(respond(THOUGHT))
    assert found == pytest.approx(by_hand(model, tokens))


def test_of_a_summary_the_reasoning_is_not_seen(model: Transformer, tokenizer: Tokenizer) -> None:
    whole, summary = (ModelReward(model, tokenizer, part=part) for part in ("whole", "summary"))
    other = THOUGHT.replace("how", "then")
    assert summary(respond(THOUGHT)) == summary(respond(other)) == whole(respond("fine, thanks"))
    assert whole(respond(THOUGHT)) != whole(respond(other))


def test_an_empty_answer_has_a_score(model: Transformer, tokenizer: Tokenizer) -> None:
    reward = ModelReward(model, tokenizer, part="summary")
    assert reward(respond("<think>never ends")) == reward.grade("question", "") != 0


def test_reasoning_is_written_before_the_score(model: Transformer, tokenizer: Tokenizer) -> None:
    reward = ModelReward(model, tokenizer, reasoning_tokens=5)
    score, reasoning = reward.judge("question", "fine")
    assert reasoning
    prompt = ChatTemplate(format="v3.1").render([{"role": "user", "content": "question"}])
    tokens = [*ids(tokenizer, prompt), *ids(tokenizer, f"fine{EOS}"), *ids(tokenizer, "<think>")]
    (begun,) = ids(tokenizer, "<think>")
    with torch.no_grad():
        for _ in range(5):
            token = int(model(torch.tensor([tokens]))[0, -1].argmax())
            tokens.append(token)
    tokens.append(*ids(tokenizer, "</think>"))
    assert tokenizer.decode(tokens[tokens.index(begun) + 1 : -1]) == reasoning
    assert score == pytest.approx(by_hand(model, tokens), rel=1e-5)
    assert reward.judge("question", "fine") == (score, reasoning)
    assert score != ModelReward(model, tokenizer).grade("question", "fine")


def test_a_checkpoint_scores_as_the_model_that_it_was_saved_from(
    checkpoint: Path, model: Transformer, tokenizer: Tokenizer
) -> None:
    response = respond("fine, thanks")
    assert model_reward(checkpoint)(response) == ModelReward(model, tokenizer)(response)


def test_transformers_gives_the_same_score(
    checkpoint: Path, model: Transformer, tokenizer: Tokenizer
) -> None:
    from transformers import DeepseekV3ForSequenceClassification

    theirs = DeepseekV3ForSequenceClassification.from_pretrained(
        checkpoint, dtype=torch.float32, experts_implementation="eager"
    )
    assert theirs.config.num_labels == 1
    tokens = [*ids(tokenizer, "how are you"), *ids(tokenizer, EOS)]
    with torch.no_grad():
        score = theirs.eval()(torch.tensor([tokens])).logits
    assert score.shape == (1, 1)
    assert score.item() == pytest.approx(by_hand(model, tokens), rel=1e-4)
    # The network that writes is still there.
    writing = open_in_transformers(checkpoint, unused={"score.weight"})
    with torch.no_grad():
        logits, ours = (m(torch.tensor([tokens])) for m in (writing, model))
    torch.testing.assert_close(logits.logits, ours, rtol=1e-3, atol=1e-4)


def test_it_is_one_reward_among_others_and_judges_pairs(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    reward = ModelReward(model, tokenizer)
    said: list[str] = []
    composed = Composed(
        [Weighted("model", reward, 2.0), Weighted("one", lambda r: 1.0)], say=said.append
    )
    responses = [respond(text) for text in ("fine", "and", "thanks", "how")]
    assert [s.total for s in composed.score(responses)] == [2 * reward(r) + 1 for r in responses]
    assert not said
    better = max(("fine", "and"), key=lambda text: reward.grade("question", text))
    pair = Pair("question", better, "and" if better == "fine" else "fine")
    assert score_pairs([pair], by_grade(reward.grade)).mean == 1


def test_recipes_name_them(checkpoint: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    tasks, response = Mixture.named({"sums": 1.0}), respond(THOUGHT)

    def total(spec: str) -> float:
        return find_rewards(spec, tasks, 99, print).score([response])[0].total

    safe, helpful = (
        ModelReward(model, tokenizer, part=part)(response) for part in ("whole", "summary")
    )
    found = total(f"safe:{checkpoint}=0.5,helpful:{checkpoint}")
    assert found == pytest.approx(0.5 * safe + helpful)
    reasoned = ModelReward(model, tokenizer, reasoning_tokens=4)(response)
    assert total(f"safe:{checkpoint}:4") == pytest.approx(reasoned)
    with pytest.raises(BadInput, match="no such folder"):
        total(f"safe:{checkpoint}/none")


def test_models_that_give_no_score_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    plain = random_model(vocab_size=300)
    with pytest.raises(BadInput, match="num_labels = 0 gives no score"):
        ModelReward(plain, tokenizer)
    save(random_model(vocab_size=300, num_labels=1), tmp_path / "bare")
    with pytest.raises(BadInput, match=r"has no tokenizer\.json"):
        model_reward(tmp_path / "bare")
