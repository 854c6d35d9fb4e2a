"""What trl computes of some tensors: its losses, their gradients, and its advantages, as JSON.

A script for an environment that has trl; nothing of ours is imported. Its trainers are made whole,
with a network of a few hundred weights that nobody trains, and asked for the loss of
log-probabilities and scores that are drawn here. ``python -m tests.trl`` runs it.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
)

WORDS = ("<pad>", "<eos>", "a", "b", "c", "d")
# Lengths of the answers of two groups; the longest is a row's.
LENGTHS = (3, 7, 5, 2, 6, 4)
REWARDS = ((1.0, 0.0, 0.5, 0.25), (2.0, 2.0, 2.0, 2.0), (-1.0, 0.125, 3.0, 3.0))
SETTINGS: dict[str, Any] = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def main() -> None:
    """Write the vectors to the file that is named."""
    torch.manual_seed(0)
    versions = {name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers")}
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "command": "python -m tests.trl --write",
            "versions": versions,
            "advantages": advantages(folder),
            "policy": policy(folder),
            "preference": preference(folder),
            "pairs": pairs(folder),
        }
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        file.write(written(found))


def written(found: dict[str, Any]) -> str:
    """Return vectors as JSON, a line a case."""
    kinds = []
    for kind, cases in found.items():
        text = json.dumps(cases)
        if isinstance(cases, list):
            text = "[\n" + ",\n".join(map(json.dumps, cases)) + "\n]"
        kinds.append(f'"{kind}": {text}')
    return "{\n" + ",\n".join(kinds) + "\n}\n"


# --- what trainers want ---------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of six words."""
    words = models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="a")
    plain = Tokenizer(words)
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="a"
    )


def network() -> LlamaConfig:
    """Return the dimensions of a network that is there for the sake of form."""
    return LlamaConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_labels=1, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip


def reinforcing(folder: str, rewards: Callable[..., list[float]], **settings: Any) -> GRPOTrainer:
    """Return a trainer whose model is in evaluation: no accumulation over micro-batches."""
    config = GRPOConfig(
        folder, num_generations=4, per_device_train_batch_size=12, max_completion_length=7,
        **SETTINGS, **settings,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "a b"}] * 3)
    # The reference is read from where the model was.
    LlamaForCausalLM(network()).save_pretrained(f"{folder}/network")
    model = LlamaForCausalLM.from_pretrained(f"{folder}/network")
    trainer = GRPOTrainer(model, rewards, config, train_dataset=data, processing_class=tokenizer())
    trainer.model.eval()
    return trainer


# --- GRPO -----------------------------------------------------------------------------------------


def advantages(folder: str) -> list[dict[str, Any]]:
    """Return the advantages of rewards in groups of four, for every way to scale them."""
    given = [reward for group in REWARDS for reward in group]
    found = []
    for scale in ("group", "none"):
        trainer = reinforcing(folder, lambda **_: given, scale_rewards=scale)
        trainer.num_generations_eval = 4
        inputs = [{"prompt": "a b"} for _ in given]
        scored = trainer._generate_and_score_completions(inputs)
        values = scored["advantages"].view(len(REWARDS), -1).tolist()
        found.append({"scale": scale, "rewards": REWARDS, "advantages": values})
    return found


def policy(folder: str) -> list[dict[str, Any]]:
    """Return losses of log-probabilities, and their gradients, for every form of a ratio."""
    forms = {
        "token": {"loss_type": "grpo"},
        "batch": {"loss_type": "dapo"},
        "sequence": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    }
    terms = ({"epsilon": 0.2}, {"epsilon": 0.1, "epsilon_high": 0.28, "beta": 0.04})
    found = []
    for form, how in forms.items():
        for more in terms:
            # By default trl multiplies its KL term by the ratio, as V3.2 does; V3 does not.
            plain = {"beta": 0.0, "use_bias_correction_kl": False}
            trainer = reinforcing(folder, lambda **_: [], **{**plain, **how, **more})
            drawn = _answers()
            found.append({"form": form, **_terms(more), **drawn, **_loss(trainer, drawn)})
    return found


def _terms(more: dict[str, float]) -> dict[str, float]:
    return {
        "clip": more["epsilon"],
        "clip_high": more.get("epsilon_high", more["epsilon"]),
        "kl_weight": more.get("beta", 0.0),
    }


def _answers() -> dict[str, Any]:
    """Draw log-probabilities of answers: now, when they were sampled, and by a reference."""
    generator = torch.Generator().manual_seed(3)
    rows, longest = len(LENGTHS), max(LENGTHS)
    old = -3 * torch.rand(rows, longest, generator=generator)
    now = (old + 0.3 * torch.randn(rows, longest, generator=generator)).clamp(max=-0.01)
    reference = (old + 0.2 * torch.randn(rows, longest, generator=generator)).clamp(max=-0.01)
    mask = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    return {
        "log_probs": now.tolist(),
        "old": old.tolist(),
        "reference": reference.tolist(),
        "mask": mask.int().tolist(),
        "advantages": torch.randn(rows, generator=generator).tolist(),
    }


def _loss(trainer: GRPOTrainer, drawn: dict[str, Any]) -> dict[str, Any]:
    log_probs = torch.tensor(drawn["log_probs"], requires_grad=True)
    mask = torch.tensor(drawn["mask"])
    prompt = torch.ones(len(mask), 1, dtype=torch.long)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        log_probs, torch.zeros_like(log_probs), None,
    )  # fmt: skip
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": torch.full_like(mask, 2),
        "completion_mask": mask,
        "advantages": torch.tensor(drawn["advantages"]),
        "old_per_token_logps": torch.tensor(drawn["old"]),
        "ref_per_token_logps": torch.tensor(drawn["reference"]),
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return {"loss": loss.item(), "gradient": log_probs.grad.tolist()}


# --- pairs ----------------------------------------------------------------------------------------


def preference(folder: str) -> list[dict[str, Any]]:
    """Return losses of pairs of answers: the first half of the rows are the chosen ones."""
    found = []
    for beta in (0.1, 0.7):
        config = DPOConfig(folder, beta=beta, **SETTINGS)
        data = Dataset.from_list([{"prompt": "a b", "chosen": " c", "rejected": " d"}])
        model, other = LlamaForCausalLM(network()), LlamaForCausalLM(network())
        trainer = DPOTrainer(model, other, config, train_dataset=data, processing_class=tokenizer())
        trainer.model.eval()
        drawn = _answers()
        mask = torch.tensor(drawn["mask"])
        log_probs = torch.tensor(drawn["log_probs"], requires_grad=True)
        trainer.ref_model = _gives(torch.tensor(drawn["reference"]) * mask)
        prompt = torch.zeros(len(mask), 1, dtype=torch.long)
        inputs = {
            "input_ids": torch.full((len(mask), 1 + mask.shape[1]), 2),
            "attention_mask": torch.cat((prompt + 1, mask), 1),
            "completion_mask": torch.cat((prompt, mask), 1),
        }
        # trl's networks give nothing for what is masked.
        loss = trainer._compute_loss(_gives(log_probs * mask), inputs, False)
        loss.backward()
        told = trainer._metrics["eval"]
        found.append(
            {
                "beta": beta,
                **{name: drawn[name] for name in ("log_probs", "reference", "mask")},
                "loss": loss.item(),
                "gradient": log_probs.grad.tolist(),
                "accuracy": told["rewards/accuracies"][-1],
                "margin": told["rewards/margins"][-1],
                "chosen": told["rewards/chosen"][-1],
                "rejected": told["rewards/rejected"][-1],
            }
        )
    return found


def _gives(log_probs: torch.Tensor) -> Callable[..., SimpleNamespace]:
    """Return a model that has these log-probabilities, whatever it is given."""
    nothing = torch.zeros_like(log_probs)
    return lambda **_: SimpleNamespace(
        log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )


def pairs(folder: str) -> list[dict[str, Any]]:
    """Return the loss of pairs of scores."""
    config = RewardConfig(folder, **SETTINGS)
    data = Dataset.from_list([{"chosen": "a b c", "rejected": "a b d"}])
    model = LlamaForSequenceClassification(network())
    trainer = RewardTrainer(model, config, train_dataset=data, processing_class=tokenizer())
    trainer.model.eval()
    generator = torch.Generator().manual_seed(5)
    scores = (3 * torch.randn(12, 1, generator=generator)).requires_grad_()
    inputs = {"input_ids": torch.ones(12, 1), "attention_mask": torch.ones(12, 1)}
    loss = trainer.compute_loss(lambda **_: SimpleNamespace(logits=scores), inputs)
    loss.backward()
    told = trainer._metrics["eval"]
    return [
        {
            "chosen": scores[:6, 0].tolist(),
            "rejected": scores[6:, 0].tolist(),
            "loss": loss.item(),
            "gradient": scores.grad[:, 0].tolist(),
            "accuracy": told["accuracy"][-1],
            "margin": told["margin"][-1],
        }
    ]


if __name__ == "__main__":
    main()
