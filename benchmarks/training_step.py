"""A training step of the tiny preset's main model, beside transformers' DeepseekV3ForCausalLM.

Both run the same network (no MTP) on the same tokens: forward, loss, backward, clip, AdamW, FP32.
Prints tokens/s of both and the median ratio of the rounds, as JSON in the last line.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable

import torch
import transformers
from support import alternate, report

import ziphius
from ziphius.config.recipe import Recipe, load_recipe
from ziphius.training.optimizer import AdamW
from ziphius.training.run import build_model
from ziphius.training.step import train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--sequences", type=int, default=8, help="sequences of 512 tokens a step")
    parser.add_argument("--record", action="store_true", help="keep the result in results/")
    options = parser.parse_args()
    batch = options.sequences
    recipe = load_recipe(
        "tiny",
        [
            "model.num_nextn_predict_layers=0",
            f"pretrain.batch_size={batch}",
            f"pretrain.micro_batch_size={batch}",
            'pretrain.moments="float32"',
        ],
    )
    length, vocabulary = recipe.pretrain.sequence_length, recipe.model.vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(0, vocabulary, (batch, length + 1), generator=generator)
    ours, theirs = ziphius_step(recipe, tokens_BS), transformers_step(recipe, tokens_BS)
    times = alternate({"ziphius": ours, "transformers": theirs}, options.rounds)
    ratios = [t / z for z, t in zip(times["ziphius"], times["transformers"], strict=True)]
    speeds = {name: batch * length / min(seconds) for name, seconds in times.items()}
    figures = {
        "tokens_per_s": {name: round(speed) for name, speed in speeds.items()},
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "rounds": options.rounds,
        "tokens_a_step": batch * length,
        "transformers": transformers.__version__,
    }
    report("training_step", figures, record=options.record)


def ziphius_step(recipe: Recipe, tokens_BS: torch.Tensor) -> Callable[[], object]:
    model = build_model(recipe)
    optimizer = AdamW(model.parameters(), recipe.pretrain)
    return lambda: train_step(model, optimizer, tokens_BS, recipe.pretrain, 1e-4)


def transformers_step(recipe: Recipe, tokens_BS: torch.Tensor) -> Callable[[], object]:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        ziphius.save(build_model(recipe), f"{folder}/model")
        model = transformers.DeepseekV3ForCausalLM.from_pretrained(f"{folder}/model").train()
    c = recipe.pretrain
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(c.beta1, c.beta2), weight_decay=c.weight_decay
    )

    def step() -> None:
        logits = model(tokens_BS[:, :-1]).logits.flatten(0, 1)
        torch.nn.functional.cross_entropy(logits.float(), tokens_BS[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
