"""``LLM``: answers equal the slow specification, from a folder or from a model that is learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import ziphius
from tests.support import F64, random_batch, random_model, random_tokens, step_settings, tiny_config
from ziphius.config.errors import BadInput
from ziphius.config.model import Yarn
from ziphius.config.pretrain import PretrainConfig
from ziphius.data.tokenizer import save_tokenizer, train_tokenizer
from ziphius.inference.llm import LLM
from ziphius.inference.noise import Noise
from ziphius.inference.outputs import RequestOutput
from ziphius.inference.params import SamplingParams
from ziphius.inference.sampler import Sampler
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer
from ziphius.training.optimizer import AdamW
from ziphius.training.step import train_step

MODELS: list[dict[str, Any]] = [
    {},
    {"q_lora_rank": None, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
    {"rope_scaling": Yarn(original_max_position_embeddings=8, factor=4.0)},
    {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0},
]
TEXT = "Zähle die Wale: 🐋🐳 鯨 нарвал, and whales are counted twice; whales dive. "
BF16 = torch.bfloat16


@pytest.fixture(params=["torch", "compiled"])
def how(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options for either kind of kernels."""
    options: dict[str, Any] = {"kernels": request.param, "cache_tokens": 1024}
    if request.param == "compiled":
        options["kernel_cache"] = request.getfixturevalue("kernel_folder")
    return options


@pytest.fixture
def compiled(kernel_folder: Path) -> dict[str, Any]:
    return {"kernels": "compiled", "kernel_cache": kernel_folder, "cache_tokens": 1024}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Train a tokenizer that leaves most characters in more than one token."""
    return train_tokenizer([TEXT * 3], 330)


@torch.no_grad()
def slowly(model: Transformer, prompt: list[int], params: SamplingParams) -> list[int]:
    """The specification: the whole sequence again for every token, in the expanded form."""
    assert isinstance(model.config.eos_token_id, int)
    assert params.max_tokens is not None
    noise, ends = Noise(params.seed or 0), [model.config.eos_token_id]
    sampler, ids = Sampler(params, prompt, noise, stop_ids=ends), list(prompt)
    for _ in range(params.max_tokens):
        logits_V = model(torch.tensor([ids]))[0, -1]
        ids.append(sampler.choose(logits_V, ids[len(prompt) :]).token)
        if ids[-1] in sampler.stop_ids:
            break
    return ids[len(prompt) :]


def ids_of(output: RequestOutput) -> list[int]:
    return list(output.outputs[0].token_ids)


def generated(llm: LLM, prompt: list[int], **params: Any) -> list[int]:
    """Generate greedily unless a temperature is given."""
    return ids_of(llm.generate(prompt, SamplingParams(**{"temperature": 0} | params))[0])


def prompts(model: Transformer) -> list[list[int]]:
    return [random_tokens(model.config, 1, n, seed=n)[0].tolist() for n in (1, 2, 9, 33)]


# --- with the cache and without -------------------------------------------------------------------


@pytest.mark.parametrize("changes", MODELS)
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.9}])
def test_answers_equal_the_slow_ones(
    changes: dict[str, Any], sampling: dict[str, Any], how: dict[str, Any]
) -> None:
    model = random_model(precision=F64, **changes)
    params = SamplingParams(max_tokens=12, seed=5, ignore_eos=True, **sampling)
    outputs = LLM.of(model, **how).generate(prompts(model), params)
    answers = [ids_of(output) for output in outputs]
    assert answers == [slowly(model, prompt, params) for prompt in prompts(model)]
    assert len(set(map(tuple, answers))) > 1, "the model ignores its prompt"


def test_a_seed_repeats_and_does_not_touch_the_global_generator(compiled: dict[str, Any]) -> None:
    llm = LLM.of(random_model(), **compiled)
    sampling = {"max_tokens": 20, "temperature": 2.0}
    state = torch.get_rng_state()
    first = generated(llm, [7], seed=1, **sampling)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert generated(llm, [7], seed=1, **sampling) == first
    assert generated(llm, [7], seed=2, **sampling) != first


def test_without_a_seed_answers_differ(compiled: dict[str, Any]) -> None:
    llm = LLM.of(random_model(), **compiled)
    answers = {tuple(generated(llm, [1], temperature=5.0, ignore_eos=True)) for _ in range(4)}
    assert len(answers) == 4


def test_two_streams_interleaved_do_not_disturb_each_other(compiled: dict[str, Any]) -> None:
    llm = LLM.of(random_model(), **compiled)
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=3, ignore_eos=True)
    alone = [ids_of(llm.generate([[i]], params)[0]) for i in (1, 2)]
    together: list[list[int]] = [[], []]
    streams = [llm.stream([i], params) for i in (1, 2)]
    going = dict(enumerate(streams))
    while going:
        for number, stream in list(going.items()):
            step = next(stream, None)
            if step is None:
                del going[number]
            else:
                together[number] += step[0].token_ids
    assert together == alone


def test_a_stream_that_is_left_gives_its_pages_back(compiled: dict[str, Any]) -> None:
    llm = LLM.of(random_model(), **compiled)
    for _ in llm.stream([1, 2, 3], SamplingParams(max_tokens=50, n=3, ignore_eos=True)):
        assert torch.is_grad_enabled()
        break
    assert llm.engine.idle
    assert llm.engine.pool.used == 0


def test_an_interrupted_batch_gives_its_pages_back(compiled: dict[str, Any]) -> None:
    llm = LLM.of(random_model(), **compiled)
    steps = 0

    def interrupt(done: int, count: int) -> None:
        nonlocal steps
        assert count == 4
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(
            [[i] * 9 for i in (1, 2, 3, 4)],
            SamplingParams(max_tokens=50, ignore_eos=True),
            on_progress=interrupt,
        )
    assert llm.engine.idle
    assert llm.engine.pool.used == 0


def test_an_interrupted_step_gives_its_pages_back(
    compiled: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes at any moment, and the next prompt is answered all the same."""
    llm = LLM.of(random_model(), **compiled)
    params = SamplingParams(max_tokens=9, ignore_eos=True, seed=1)
    expected = ids_of(llm.generate([1, 2, 3], params)[0])
    for part in ("forward.hidden", "forward.logits", "forward.draft", "cache.copy"):
        owner, name = part.split(".")
        with monkeypatch.context() as patch:
            patch.setattr(getattr(llm.engine, owner), name, _interrupted)
            with pytest.raises(KeyboardInterrupt):
                llm.generate([[1, 2, 3], [4]], params)
        assert llm.engine.idle, part
        assert llm.engine.pool.used == 0, part
        assert not llm.engine._requests, part
        assert ids_of(llm.generate([1, 2, 3], params)[0]) == expected, part


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_more_prompts_than_may_wait(compiled: dict[str, Any]) -> None:
    llm = LLM.of(random_model(), max_waiting=2, max_running=2, **compiled)
    params = SamplingParams(max_tokens=3, ignore_eos=True, temperature=0)
    outputs = llm.generate([[i] for i in range(1, 12)], params)
    assert [output.prompt_token_ids for output in outputs] == [(i,) for i in range(1, 12)]
    assert ids_of(outputs[7]) == generated(llm, [8], max_tokens=3, ignore_eos=True)


def test_progress_ends_with_everything_answered(compiled: dict[str, Any]) -> None:
    llm, seen = LLM.of(random_model(), **compiled), []
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 5, 9)]
    outputs = llm.generate([[1], [2], [3]], params, on_progress=lambda *n: seen.append(n))
    assert [len(ids_of(output)) for output in outputs] == [2, 5, 9]
    assert seen[0] == (0, 3)
    assert seen[-1] == (3, 3)
    assert seen == sorted(seen)


# --- where it ends --------------------------------------------------------------------------------


def test_a_stop_id_is_the_last_token(compiled: dict[str, Any]) -> None:
    model = random_model()
    whole = generated(LLM.of(model, **compiled), [7], max_tokens=20, ignore_eos=True)
    stop = whole[6]
    until = whole[: whole.index(stop) + 1]
    llm = LLM.of(model, **compiled)
    stopped = generated(llm, [7], max_tokens=20, ignore_eos=True, stop_token_ids=[stop])
    assert stopped == until
    ending = random_model(model.config.model_copy(update={"eos_token_id": stop}))
    assert generated(LLM.of(ending, **compiled), [7], max_tokens=20) == until
    several = random_model(model.config.model_copy(update={"eos_token_id": (stop, whole[0])}))
    assert generated(LLM.of(several, **compiled), [7], max_tokens=20) == whole[:1]


def test_the_context_ends_the_answer(how: dict[str, Any]) -> None:
    model = random_model(max_position_embeddings=16)
    llm = LLM.of(model, **how)
    prompt = random_tokens(model.config, 1, 12)[0].tolist()
    assert len(generated(llm, prompt, max_tokens=50, ignore_eos=True)) == 4
    assert len(generated(llm, [*prompt, 1, 2, 3], max_tokens=50, ignore_eos=True)) == 1
    assert len(generated(llm, prompt, max_tokens=None, ignore_eos=True)) == 4


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([[]], "the prompt is empty"),
        ([1, 61], "token id 61 is outside the model's vocabulary of 61"),
        ([1, -1], "token id -1 is outside the model's vocabulary of 61"),
        ([1] * 16, "the prompt has 16 tokens and the model's context 16"),
        ([1] * 40, "the prompt has 40 tokens and the model's context 16"),
        ([[1.5]], r"a list of token ids, not \[1\.5\]"),
        ([3.5], "a prompt is text or a list of token ids, not 3.5"),
        ("text", "no tokenizer"),
        ({"text": "x"}, "a prompt has 'prompt' or 'prompt_token_ids'"),
    ],
)
def test_bad_prompts(prompt: Any, expected: str, compiled: dict[str, Any]) -> None:
    llm = LLM.of(random_model(max_position_embeddings=16), **compiled)
    with pytest.raises(BadInput, match=expected):
        llm.generate(prompt)
    assert llm.engine.idle


def test_one_bad_prompt_refuses_the_batch(compiled: dict[str, Any]) -> None:
    llm = LLM.of(random_model(), **compiled)
    with pytest.raises(BadInput, match="token id 61 is outside"):
        llm.generate([[1, 2], [61]])
    assert llm.engine.idle
    with pytest.raises(BadInput, match="2 sampling parameters for 1 prompts"):
        llm.generate([[1, 2]], [SamplingParams()] * 2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"cache_token": 9}, "unknown option 'cache_token'; did you mean 'cache_tokens'"),
        ({"exact": False}, "unknown option 'exact'"),
        ({"kernels": "cuda"}, "kernels = 'cuda': use auto, compiled, torch or triton"),
        ({"kernels": "torch", "cache_tokens": 0}, "holds nothing"),
        ({"kernels": "torch", "speculation": "no"}, "use off, auto or on"),
        ({"kernels": "torch", "draft_depth": 0}, "draft depth = 0"),
        ({"kernels": "torch", "verification": "no"}, "use coupled or rejection"),
    ],
)
def test_bad_options(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(BadInput, match=expected):
        LLM.of(random_model(), **options)


def test_speculation_needs_a_module_to_draft_with() -> None:
    model = random_model(num_nextn_predict_layers=0)
    with pytest.raises(BadInput, match="use off, auto or on"):
        LLM.of(model, kernels="torch", speculation="no")
    with pytest.raises(BadInput, match="no MTP module"):
        LLM.of(model, kernels="torch", speculation="on")


# --- text -----------------------------------------------------------------------------------------


def text_model(**changes: Any) -> Transformer:
    return random_model(tiny_config(vocab_size=330, **changes))


def test_text_is_that_of_the_tokens(tokenizer: Tokenizer, compiled: dict[str, Any]) -> None:
    """A prompt begins with the first token, and the pieces are the new tokens' text."""
    llm = LLM.of(text_model(), tokenizer, **compiled)
    params = SamplingParams(max_tokens=15, seed=2, skip_special_tokens=False, ignore_eos=True)
    deltas = [delta for (delta,) in llm.stream("whales", params)]
    (output,) = llm.generate("whales", params)
    ids = [0, *tokenizer.encode("whales", add_special_tokens=False).ids]
    assert output.prompt == "whales"
    assert list(output.prompt_token_ids) == ids
    answer = output.outputs[0]
    assert [token for delta in deltas for token in delta.token_ids] == list(answer.token_ids)
    assert "".join(delta.text for delta in deltas) == answer.text
    assert answer.text == tokenizer.decode(list(answer.token_ids), skip_special_tokens=False)
    assert deltas[-1].finish_reason == answer.finish_reason == "length"


def test_text_ends_where_it_should(tokenizer: Tokenizer, compiled: dict[str, Any]) -> None:
    llm = LLM.of(text_model(max_position_embeddings=32), tokenizer, **compiled)
    params: dict[str, Any] = {"max_tokens": None, "seed": 4, "ignore_eos": True}

    def written(**more: Any) -> str:
        return llm.generate("whales", SamplingParams(**params, **more))[0].outputs[0].text

    whole = written()
    stop = [c for c in whole if c.isascii() and c.isalpha()][3]
    assert written(stop=stop) == whole.split(stop)[0]
    assert stop not in written(bad_words=[stop])


def test_an_empty_text_is_its_first_token(tokenizer: Tokenizer, compiled: dict[str, Any]) -> None:
    llm = LLM.of(text_model(), tokenizer, **compiled)
    (output,) = llm.generate("", SamplingParams(max_tokens=2, ignore_eos=True))
    assert output.prompt_token_ids == (0,)
    assert len(ids_of(output)) == 2


def test_text_that_is_not_utf8_is_refused(tokenizer: Tokenizer, compiled: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="UTF-8"):
        LLM.of(text_model(), tokenizer, **compiled).generate("\udcff")


def test_a_regular_expression_holds(tokenizer: Tokenizer, compiled: dict[str, Any]) -> None:
    llm = LLM.of(text_model(), tokenizer, **compiled)
    params = SamplingParams(max_tokens=20, seed=1, regex="(whale|dive){2}")
    text = llm.generate("whales", params)[0].outputs[0].text
    assert text in {a + b for a in ("whale", "dive") for b in ("whale", "dive")}


# --- where the model comes from -------------------------------------------------------------------


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A checkpoint with its tokenizer."""
    ziphius.save(text_model(), tmp_path / "checkpoint")
    save_tokenizer(tokenizer, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_folder_answers_as_its_model(
    folder: Path, tokenizer: Tokenizer, compiled: dict[str, Any]
) -> None:
    params = SamplingParams(max_tokens=12, seed=1, logprobs=2)
    loaded, own = LLM(folder, **compiled), LLM.of(text_model(), tokenizer, **compiled)
    assert loaded.generate("whales", params) == own.generate("whales", params)
    without = LLM(folder, mtp=False, **compiled)
    (output,) = without.generate("whales", params)
    assert output.outputs == own.generate("whales", params)[0].outputs
    assert not without.model.mtp
    assert LLM(folder, dtype="bfloat16", **compiled).model.precision.compute == BF16


def test_an_unknown_option_is_named_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="unknown option 'max_runing'; did you mean 'max_running'"):
        LLM(tmp_path, max_runing=3)


@pytest.mark.parametrize("precision", [F64, Precision.for_training(BF16)], ids=["F64", "master"])
def test_a_model_in_memory_is_not_copied_nor_changed(
    precision: Precision, how: dict[str, Any]
) -> None:
    model = random_model(precision=precision)
    kernels, names = str(model.kernels), dict(model.named_parameters())
    llm = LLM.of(model, **how)
    for name, tensor in llm.model.state_dict().items():
        assert tensor.data_ptr() == model.state_dict()[name].data_ptr(), name
    generated(llm, [1, 2, 3], max_tokens=3)
    assert str(model.kernels) == kernels
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter is names[name]
        assert parameter.requires_grad
    assert all(block.self_attn.absorbed is None for _, _, block in model.blocks())


def test_master_weights_answer_as_what_they_are_rounded_to(how: dict[str, Any]) -> None:
    """FP32 masters of BF16 numbers are the same bits as the numbers stored in BF16."""
    stored = random_model(precision=Precision.for_inference(BF16))
    master = random_model(precision=Precision.for_training(BF16))
    with torch.no_grad():
        for weight in master.parameters():
            weight.copy_(weight.bfloat16())
    params = SamplingParams(max_tokens=8, seed=1, temperature=1.0, logprobs=3, prompt_logprobs=1)
    one, other = (LLM.of(m, **how).generate([[1, 2, 3]], params) for m in (stored, master))
    assert one == other


def test_the_precision_is_the_models_own(how: dict[str, Any]) -> None:
    """FP32 masters under BF16: log-probabilities are near those of the training kernels."""
    model = random_model(precision=Precision.for_training(BF16))
    prompt = random_tokens(model.config, 1, 20)[0].tolist()
    (output,) = LLM.of(model, **how).score([prompt])
    assert output.prompt_logprobs is not None
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([prompt]))[0].float().log_softmax(-1)
    for place, scored in enumerate(output.prompt_logprobs[1:]):
        assert scored is not None
        assert scored.logprob == pytest.approx(logprobs_TV[place, scored.token].item(), abs=0.15)


PROMPT = [int(x) for x in random_tokens(tiny_config(), 1, 40, seed=8)[0]]


@pytest.mark.parametrize("speculation", ["off", "on"])
def test_answers_follow_weights_that_change_in_place(speculation: str, how: dict[str, Any]) -> None:
    """Absorbed projections are derived again, and prefixes of earlier weights forgotten."""
    model = random_model(precision=F64)
    llm = LLM.of(model, speculation=speculation, **how)
    params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
    before = ids_of(llm.generate([PROMPT], params)[0])
    assert before == slowly(model, PROMPT, params)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
        for _, _, block in model.blocks():
            for _, bias_E in block.named_buffers():
                bias_E.neg_()
    llm.weights_changed()
    (output,) = llm.generate([PROMPT], params)
    after = slowly(model, PROMPT, params)
    assert ids_of(output) == after != before
    assert output.num_cached_tokens == 0
    assert ids_of(llm.generate([PROMPT], params)[0]) == after


def test_answers_follow_a_training_step_under_bf16(compiled: dict[str, Any]) -> None:
    config = PretrainConfig(
        steps=10,
        batch_size=4,
        micro_batch_size=4,
        sequence_length=10,
        learning_rate=0.05,
        final_learning_rate=0.05,
    )
    model = random_model(precision=Precision.for_training(BF16))
    llm = LLM.of(model, **compiled)
    params = SamplingParams(max_tokens=10, seed=1, logprobs=0, ignore_eos=True)
    before = llm.generate([PROMPT], params)
    optimizer = AdamW(model.parameters(), config)
    batch = random_batch(model.config, 4, 11)
    train_step(model, optimizer, batch, config, step_settings(config, 0.05))
    llm.weights_changed()
    after = llm.generate([PROMPT], params)
    fresh = LLM.of(model, **compiled).generate([PROMPT], params)
    assert after[0].outputs == fresh[0].outputs != before[0].outputs


def test_weights_that_moved_are_found_again(compiled: dict[str, Any]) -> None:
    model = random_model(precision=F64)
    llm = LLM.of(model, **compiled)
    for weight in model.parameters():
        weight.data = weight.data * 1.1
    llm.weights_changed()
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    assert ids_of(llm.generate([PROMPT], params)[0]) == slowly(model, PROMPT, params)


def test_weights_do_not_change_under_a_request(compiled: dict[str, Any]) -> None:
    llm = LLM.of(random_model(), **compiled)
    stream = llm.stream([1, 2], SamplingParams(max_tokens=9, ignore_eos=True))
    next(stream)
    with pytest.raises(BadInput, match="requests that are being answered"):
        llm.weights_changed()
    assert sum(len(step[0].token_ids) for step in stream) == 8
    llm.weights_changed()


def test_a_model_held_as_its_file_has_it_has_no_twin(
    folder: Path, compiled: dict[str, Any]
) -> None:
    with pytest.raises(BadInput, match=r"open the checkpoint by LLM\(path\)"):
        LLM.of(LLM(folder, **compiled).model, **compiled)
