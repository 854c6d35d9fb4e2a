"""A training step of ours and of transformers, from the same weights and on the same tokens."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ziphius.checkpoint.config_json import config_json
from ziphius.config.recipe import Recipe, load_recipe
from ziphius.data.rows import Batch
from ziphius.model.init import initialise
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer
from ziphius.model.weights import ROUTING_BIAS, named_weights
from ziphius.training.optimizer import AdamW
from ziphius.training.run import build_model, resolve
from ziphius.training.schedule import settings_at
from ziphius.training.step import train_step

Step = Callable[[], float]
# No balancing and no MTP, which transformers has not, and a constant rate.
SAME = (
    "model.num_nextn_predict_layers=0",
    "pretrain.balance_loss_weight=0",
    "pretrain.bias_update_speed=0",
    "pretrain.learning_rate=2e-4",
    "pretrain.final_learning_rate=2e-4",
    "pretrain.warmup_steps=0",
)
# Ways to run the experts; the others of transformers gather a matrix a row, or need more packages.
EXPERTS = ("grouped_mm", "eager")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class Job:
    """What is trained: a recipe with changes, where, and the sizes of a step."""

    recipe: str
    changes: Sequence[str]
    device: str
    batch: int
    micro: int
    length: int

    def load(self, *more: str) -> Recipe:
        """Return the recipe, resolved on this machine."""
        sizes = (
            f"run.device={self.device}",
            f"pretrain.batch_size={self.batch}",
            f"pretrain.micro_batch_size={self.micro}",
            f"pretrain.sequence_length={self.length}",
        )
        return resolve(load_recipe(self.recipe, [*self.changes, *sizes, *more]))

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length

    def batch_of(self, recipe: Recipe) -> Batch:
        """Draw the tokens of every step, the same for all."""
        size = (self.batch, self.length + 1)
        generator = torch.Generator().manual_seed(0)
        tokens_BS = torch.randint(0, recipe.model.vocab_size, size, generator=generator)
        return Batch(tokens_BS, torch.zeros_like(tokens_BS)).to(self.device)


class Ours:
    """Ziphius in the arithmetic of ``precision.compute``."""

    def __init__(self, job: Job, compute: str, same: Sequence[str] = SAME) -> None:
        self.recipe = job.load(*same, f"precision.compute={compute}")
        self.model = build_model(self.recipe)
        self.optimizer = AdamW(self.model.parameters(), self.recipe.pretrain, self.model.kernels)
        self.batch = job.batch_of(self.recipe)
        self.settings = settings_at(self.recipe.pretrain, step=1, tokens=0)

    def about(self) -> dict[str, Any]:
        """Return the choices that were made."""
        return {"kernels": str(self.model.kernels), "recompute": self.recipe.parallel.recompute}

    def search(self, rounds: int, timed: Callable[[Step], float]) -> dict[str, Any]:
        """There is one way only."""
        return {}

    def step(self) -> float:
        """Make a step; return its loss."""
        config = self.recipe.pretrain
        return train_step(self.model, self.optimizer, self.batch, config, self.settings).loss


class Theirs:
    """transformers with SDPA and torch's fused AdamW.

    With ``master`` weights in FP32 under autocast, else weights, gradients and moments in BF16:
    faster, and less exact than what it is compared with.
    """

    def __init__(self, job: Job, *, master: bool) -> None:
        self.job, self.master = job, master
        self.recipe = job.load(*SAME)
        self.first = Transformer(self.recipe.model, Precision())
        initialise(self.first, self.recipe.run.seed)
        self.batch = job.batch_of(self.recipe)
        self.experts = EXPERTS[0]
        self.model: Any = None
        self.optimizer: Any = None

    def about(self) -> dict[str, Any]:
        """Return the choices that were made."""
        import transformers

        weights = "float32, autocast" if self.master else "bfloat16"
        return {
            "transformers": transformers.__version__,
            "weights": weights,
            "experts": self.experts,
            "attention": "sdpa",
            "optimizer": "fused AdamW",
        }

    def search(self, rounds: int, timed: Callable[[Step], float]) -> dict[str, Any]:
        """Find the fastest way to run the experts, in seconds a step; begin anew with it."""
        found: dict[str, Any] = {}
        self.build()
        for experts in EXPERTS:
            try:
                found[experts] = self._seconds(experts, rounds, timed, found)
            except (RuntimeError, ValueError, NotImplementedError, torch.OutOfMemoryError) as error:
                found[experts] = f"{type(error).__name__}: {error}"[:300]
        usable = {k: v for k, v in found.items() if isinstance(v, float)}
        if not usable:
            raise RuntimeError(f"transformers makes no step: {found}")
        self.experts = min(usable, key=lambda k: usable[k])
        self.begin()
        return found

    def _seconds(
        self, experts: str, rounds: int, timed: Callable[[Step], float], others: Mapping[str, Any]
    ) -> float:
        """Time some steps, one alone where another way took less than half of it."""
        self.experts = experts
        self.begin()
        self.step()
        least = timed(self.step)
        if any(isinstance(other, float) and 2 * other < least for other in others.values()):
            return least
        return min(least, *(timed(self.step) for _ in range(rounds - 1)))

    def build(self) -> None:
        """Make the model."""
        import transformers

        dtype = torch.float32 if self.master else torch.bfloat16
        config = transformers.DeepseekV3Config(**config_json(self.recipe.model, dtype=dtype))
        config._attn_implementation = "sdpa"
        with torch.device(self.job.device):
            self.model = transformers.DeepseekV3ForCausalLM(config).to(dtype).train()

    def begin(self) -> None:
        """Take the weights that ours begins with, and a new optimizer."""
        self.optimizer = None  # its moments, before there are others
        self.model.config._experts_implementation = self.experts
        self.model.zero_grad(set_to_none=True)
        fill(self.model, self.first)
        c = self.recipe.pretrain
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        gains = [p for p in self.model.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": gains, "weight_decay": 0.0}],
            lr=c.learning_rate,
            betas=(c.beta1, c.beta2),
            eps=c.adam_eps,
            weight_decay=c.weight_decay,
            fused=True,
        )

    def step(self) -> float:
        """Make a step; return its loss."""
        device = torch.device(self.job.device).type
        total = torch.zeros((), device=self.job.device)
        for part in self.batch.split(self.job.micro):
            inputs_BT, targets_N = part.tokens_BS[:, :-1], part.tokens_BS[:, 1:].flatten()
            with torch.autocast(device, torch.bfloat16, enabled=self.master):
                logits_NV = self.model(inputs_BT, use_cache=False).logits.flatten(0, 1)
            loss = F.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
            loss = loss / self.job.tokens
            loss.backward()
            total += loss.detach()
        norm = self.recipe.pretrain.clip_norm
        nn.utils.clip_grad_norm_(self.model.parameters(), norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total.item()


@torch.no_grad()
def fill(theirs: nn.Module, ours: Transformer) -> None:
    """Copy our weights into transformers' model. Raises ValueError where one is left over."""
    biases = {n: b for n, b in theirs.named_buffers() if n.endswith(ROUTING_BIAS)}
    targets = {**dict(theirs.named_parameters()), **biases}
    left = sum(t.numel() for t in targets.values())
    for name, tensor in named_weights(ours):
        target = _target(name, targets)
        target.copy_(tensor)
        left -= tensor.numel()
    if left:
        raise ValueError(f"{left} numbers of transformers' model were not set")


def _target(name: str, targets: Mapping[str, Tensor]) -> Tensor:
    """Find a weight's place; experts are stacked there, gates and up-projections side by side."""
    expert = _EXPERT.fullmatch(name)
    if expert is None:
        return targets[name]
    prefix, number, which = expert[1], int(expert[2]), expert[3]
    if which == "down":
        return targets[f"{prefix}.down_proj"][number]
    gate, up = targets[f"{prefix}.gate_up_proj"][number].chunk(2)
    return gate if which == "gate" else up


def peak_gib(device: str) -> float:
    """Return the most memory that was held, in GiB: of the GPU, or else of the process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
