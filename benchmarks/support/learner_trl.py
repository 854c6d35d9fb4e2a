"""trl's GRPO on transformers' model, a step a request: ``learner_trl.py CHECKPOINT JOB VARIANT``.

``JOB`` is a file with ``rl.Job``. A variant is transformers' implementation of
experts and how many answers go through the model at once when it learns, ``grouped_mm+64``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from protocol import serve
from turns import Turns


class Learner:
    def __init__(self, checkpoint: str, job: dict[str, Any], variant: str) -> None:
        import torch
        import transformers
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(job["threads"])
        experts, at_once = variant.split("+")
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
        model.set_experts_implementation(experts)
        answers = job["questions"] * job["group"]
        self.turns = Turns(lambda: self.trainer.train())
        self.trainer = GRPOTrainer(
            model=model,
            args=GRPOConfig(
                output_dir=tempfile.mkdtemp(),
                per_device_train_batch_size=int(at_once),
                gradient_accumulation_steps=answers // int(at_once),
                num_generations=job["group"],
                max_completion_length=job["max_tokens"],
                temperature=1.0,
                beta=0.0,
                loss_type="dapo",
                learning_rate=job["learning_rate"],
                max_steps=job["most_steps"],
                shuffle_dataset=False,
                gradient_checkpointing=False,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                dataloader_pin_memory=False,
            ),
            processing_class=transformers.AutoTokenizer.from_pretrained(checkpoint),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in job["prompts"]]),
            reward_funcs=[self.reward],
            callbacks=[_after_each(self.tell)],
        )
        self.sampling, self.tokens, self.rewards = 0.0, 0, [0.0]
        plain = self.trainer._generate_and_score_completions

        def timed(inputs: Any) -> Any:
            began = time.perf_counter()
            found = plain(inputs)
            self.sampling += time.perf_counter() - began
            return found

        self.trainer._generate_and_score_completions = timed

    def reward(self, completions: list[str], completion_ids: Any, **rest: Any) -> list[float]:
        self.tokens += sum(map(len, completion_ids))
        self.rewards = [share_of_vowels(text) for text in completions]
        return self.rewards

    def tell(self) -> None:
        told = {"sampling_seconds": self.sampling, "tokens": self.tokens}
        self.sampling, self.tokens = 0.0, 0
        self.turns.finished(**told, reward=sum(self.rewards) / len(self.rewards))

    def about(self) -> dict[str, Any]:
        import torch
        import transformers
        import trl

        return {
            "trl": trl.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        }

    def step(self) -> dict[str, Any]:
        return self.turns.step()


def _after_each(tell: Any) -> Any:
    from transformers import TrainerCallback

    class AfterEach(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            tell()

    return AfterEach()


def share_of_vowels(text: str) -> float:
    """A reward that every text has."""
    return sum(text.count(letter) for letter in "aeiou") / max(1, len(text))


if __name__ == "__main__":
    checkpoint, job, variant = sys.argv[1:]
    serve(lambda: Learner(checkpoint, json.loads(Path(job).read_text("utf-8")), variant))
