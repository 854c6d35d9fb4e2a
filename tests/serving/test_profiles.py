"""Profiles: how a published model wants to be asked, and whose defaults count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziphius.config.errors import BadInput
from ziphius.data.tokenizer import ASSISTANT, BOS, USER
from ziphius.inference.chat import ChatTemplate
from ziphius.inference.params import SamplingParams
from ziphius.serving.profiles import (
    PROFILES,
    model_temperature,
    profile,
    read_generation_config,
    system_in_user_turn,
)

HELLO = {"role": "user", "content": "Hello"}
BRIEF = {"role": "system", "content": "Be brief."}
DIVE = {"type": "function", "function": {"name": "dive"}}


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["v3", "r1"])
def test_r1_has_no_system_prompt_and_begins_by_thinking(form: str) -> None:
    """Also with a template that does not open the tag, as that of the first R1."""
    text = profile("r1").render(ChatTemplate(format=form), [BRIEF, HELLO])
    assert text == f"{BOS}{USER}Be brief.\n\nHello{ASSISTANT}<think>\n"


def test_r1_has_its_tools_in_the_first_turn() -> None:
    text = profile("r1").render(ChatTemplate(), [BRIEF, HELLO, HELLO], tools=[DIVE])
    assert text.startswith(f"{BOS}{USER}Be brief.\n\n")
    assert text.index("### dive") < text.index("Hello")
    own = ChatTemplate("{{ tools[0].function.name }} {{ messages[0].role }}")
    assert profile("r1").render(own, [BRIEF, HELLO], tools=[DIVE]) == "dive user"


def test_a_turn_that_is_closed_is_not_opened() -> None:
    r1 = profile("r1")
    closed = r1.render(ChatTemplate(), [HELLO], add_generation_prompt=False)
    assert closed == f"{BOS}{USER}Hello"
    assert r1.render(ChatTemplate(format="v3.1"), [HELLO]).endswith("</think>")
    assert r1.render(ChatTemplate(format="v3.1"), [HELLO], thinking=True).endswith("<think>")


@pytest.mark.parametrize("name", ["none", "v3-0324"])
def test_the_others_leave_the_prompt_as_it_is(name: str) -> None:
    template = ChatTemplate()
    expected = template.render([BRIEF, HELLO], tools=[DIVE])
    assert profile(name).render(template, [BRIEF, HELLO], tools=[DIVE]) == expected


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([HELLO], ["Hello"]),
        ([BRIEF], ["Be brief."]),
        ([BRIEF, {"role": "assistant", "content": "Hi"}], ["Be brief.", "Hi"]),
        ([HELLO, BRIEF, BRIEF], ["Be brief.\n\nBe brief.\n\nHello"]),
        ([{"role": "system", "content": ""}, HELLO], ["Hello"]),
    ],
)
def test_where_the_system_text_goes(messages: list[dict[str, Any]], expected: list[str]) -> None:
    before = json.dumps(messages)
    found = system_in_user_turn(messages)
    assert [message["content"] for message in found] == expected
    assert all(message["role"] != "system" for message in found)
    assert json.dumps(messages) == before


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "model"), [(0, 0), (0.5, 0.15), (1, 0.3), (1.5, 0.8), (2, 1.3)])
def test_the_temperature_of_v3_0324(asked: float, model: float) -> None:
    assert model_temperature(asked) == pytest.approx(model)
    found = profile("v3-0324").sampling({"temperature": asked}, {"temperature": 0.3})
    assert found["temperature"] == pytest.approx(model)


@given(st.floats(0, 2), st.floats(0, 2))
def test_its_map_rises(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert model_temperature(low) <= model_temperature(high) + 1e-12


def test_v3_0324_is_asked_at_temperature_1_by_default() -> None:
    """Its own generation_config.json has the model's temperature, which is not mapped again."""
    for generation in ({}, {"temperature": 0.3}):
        found = profile("v3-0324").sampling({}, generation)
        assert found == {"temperature": pytest.approx(0.3), "top_p": 1.0}
    with pytest.raises(BadInput, match="temperature"):
        profile("v3-0324").sampling({"temperature": "hot"})


def test_whose_defaults_count() -> None:
    none, r1 = profile("none"), profile("r1")
    assert none.sampling({}) == {"temperature": 1.0, "top_p": 1.0}
    checkpoint = {"temperature": 0.2, "top_k": 5}
    assert none.sampling({}, checkpoint) == {"temperature": 0.2, "top_p": 1.0, "top_k": 5}
    assert r1.sampling({}, checkpoint) == {"temperature": 0.6, "top_p": 0.95, "top_k": 5}
    request = {"temperature": 0, "top_p": None, "seed": 3}
    found = r1.sampling(request, checkpoint)
    assert found == {"temperature": 0, "top_p": 0.95, "top_k": 5, "seed": 3}
    SamplingParams(**found)


def test_a_profile_that_nobody_knows() -> None:
    with pytest.raises(BadInput, match="profile 'r2'; did you mean 'r1'"):
        profile("r2")


def test_profiles_are_fixed() -> None:
    with pytest.raises(TypeError):
        PROFILES["x"] = PROFILES["r1"]  # type: ignore[index]
    with pytest.raises(TypeError):
        PROFILES["r1"].defaults["top_p"] = 1  # type: ignore[index]


# --- generation_config.json -----------------------------------------------------------------------


def write(folder: Path, text: str) -> Path:
    (folder / "generation_config.json").write_text(text, "utf-8")
    return folder


def test_what_a_checkpoint_sets(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == {}
    config = {
        "_from_model_config": True,
        "bos_token_id": 0,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 40,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "max_new_tokens": 99,
        "typical_p": None,
    }
    found = read_generation_config(write(tmp_path, json.dumps(config)))
    assert found == {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 40,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "max_tokens": 99,
    }
    SamplingParams(**found)
    greedy = write(tmp_path, '{"do_sample": false, "temperature": 0.6, "top_p": null}')
    assert read_generation_config(greedy) == {"temperature": 0.0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "holds no JSON object"),
        ("[" * 100_000, "cannot be read"),
        ('{"temperature": "hot"}', "temperature = 'hot'"),
        ('{"top_p": 0}', "top_p = 0"),
        ('{"max_new_tokens": 0}', "max_tokens = 0"),
        ('{"temperature": NaN}', "temperature = nan"),
    ],
)
def test_a_file_that_is_broken(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BadInput, match=r"generation_config\.json: ") as raised:
        read_generation_config(write(tmp_path, text))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
