"""GPTQ over a checkpoint: layer after layer, on what a calibration text gives each layer to read.

    with Calibration(source, text, Gptq(bits=4)) as quantizer:
        convert(source, target, to="int4", quantizer=quantizer)

Only the layer whose matrices are being quantised is in memory, in FP32. Its inputs come from the
layers before it as they were quantised; within a layer they are those of its unquantised weights.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ziphius.checkpoint.config_json import raw_config, read_config, stored_form
from ziphius.checkpoint.folder import TOKENIZER_FILE, checkpoint_folder
from ziphius.checkpoint.huggingface import WeightReader
from ziphius.checkpoint.keys import layer_of
from ziphius.checkpoint.shards import ShardReader
from ziphius.config.errors import BadInput
from ziphius.data.tokenizer import read_tokenizer
from ziphius.inference.inputs import LayerInputs
from ziphius.kernels.gptq import DAMPING, quantize_gptq
from ziphius.kernels.integers import GROUP_SIZE, Codes, dequantize, quantize, require_possible
from ziphius.model.precision import Precision
from ziphius.model.transformer import BlockPlace, Transformer
from ziphius.model.weights import named_weights

# Sequences that run at a time.
_BATCH = 4
# Characters of a token, more than in any usual text.
_MOST_CHARACTERS = 16


@dataclass(frozen=True)
class Gptq:
    """How integers are found. ``group_size`` and ``act_order``: see ``quantize_gptq``.

    The text counts up to ``tokens``, in rows of ``sequence_length``. An expert that fewer than
    ``least_rows`` of them reach is rounded: so few rows say too little about its inputs.
    """

    bits: int = 4
    group_size: int = GROUP_SIZE
    act_order: bool = False
    damping: float = DAMPING
    tokens: int = 65536
    sequence_length: int = 512
    least_rows: int = 64

    def __post_init__(self) -> None:
        try:
            require_possible(self.bits, self.group_size)
        except ValueError as error:
            raise BadInput(f"gptq: {error}") from None
        if not 0 <= self.damping < float("inf"):
            raise BadInput(f"damping = {self.damping}: use 0 or more; 0.01 is usual")
        for name in ("tokens", "sequence_length"):
            if getattr(self, name) < 1:
                raise BadInput(f"gptq: {name} = {getattr(self, name)}: at least 1 is needed")


class Calibration:
    """A ``Quantizer`` for ``convert``, which asks for one layer's weights after the other's.

    ``experts`` and ``experts_rounded`` count the routed experts that were quantised, and those
    among them that too few rows reached. Raises BadInput for a checkpoint without a tokenizer, and
    for a text that is missing, empty or not UTF-8.
    """

    def __init__(self, source: str | Path, text: Path, how: Gptq, *, mtp: bool = True) -> None:
        folder = checkpoint_folder(Path(source))
        config = read_config(folder, mtp=mtp)
        self.how = how
        self.bits, self.group_size = how.bits, how.group_size
        self._sha256, ids = _read_text(folder, text, config.bos_token_id, how.tokens)
        length = min(how.sequence_length, config.max_position_embeddings, len(ids))
        rows = max(1, min(len(ids), how.tokens) // length)
        self._tokens = torch.tensor(ids[: rows * length]).view(rows, length).split(_BATCH)
        self._counted = rows * length
        self._reader = ShardReader(folder)
        self._weights = WeightReader(self._reader, config, stored_form(raw_config(folder)))
        self._model = Transformer(config, Precision(), device="meta")
        self._places = {place.layer: place for place in self._model.blocks()}
        self._hidden: list[Tensor] = []
        self._inputs: LayerInputs | None = None
        self._held: dict[str, Tensor] = {}
        self._at = -1
        self._experts: set[tuple[int, int]] = set()
        self._rounded: set[tuple[int, int]] = set()

    def __enter__(self) -> Calibration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reader.close()

    @property
    def experts(self) -> int:
        """Routed experts quantised so far."""
        return len(self._experts)

    @property
    def experts_rounded(self) -> int:
        """Routed experts that were rounded, because too few rows reached them."""
        return len(self._rounded)

    @torch.no_grad()
    def codes(self, name: str, weight_OI: Tensor) -> Codes:
        """Return the codes and scales of a weight; layers must come in order."""
        layer, how = layer_of(name), self.how
        while self._at < layer:
            self._go_on()
        assert layer == self._at, "weights come layer by layer"
        assert self._inputs is not None, "the layer was entered"
        expert = self._inputs.expert_of(name)
        if expert is not None:
            self._experts.add((layer, expert))
        if expert is not None and self._inputs.rows_of(expert) < how.least_rows:
            self._rounded.add((layer, expert))
            codes = quantize(weight_OI, how.bits, how.group_size)
        else:
            codes = quantize_gptq(
                weight_OI,
                self._inputs.hessian(name),
                how.bits,
                how.group_size,
                act_order=how.act_order,
                damping=how.damping,
            )
        self._held[name].copy_(dequantize(*codes, how.group_size, torch.float32))
        return codes

    def describe(self) -> dict[str, Any]:
        """Return every parameter, the text's hash, and what became of the experts."""
        return {
            "method": "gptq",
            **asdict(self.how),
            "calibration_sha256": self._sha256,
            "calibration_tokens": self._counted,
            "experts": self.experts,
            "experts_rounded": self.experts_rounded,
        }

    def _go_on(self) -> None:
        """Leave a layer with its weights quantised, and enter the next one."""
        if self._at < 0:
            self._load(self._model.embed_tokens, ["model.embed_tokens.weight"])
            self._load(self._model.norm, ["model.norm.weight"])
            self._hidden = [self._model.embed_tokens(tokens_BT) for tokens_BT in self._tokens]
        else:
            self._leave(self._places[self._at])
        self._at += 1
        place, prefix = self._places[self._at], f"model.layers.{self._at}."
        names = [name for name in self._weights.shapes if name.startswith(prefix)]
        self._held = self._load(_together(self._model, place), names)
        self._inputs = LayerInputs(place.block, prefix)
        with self._inputs.recording():
            for batch in range(len(self._tokens)):
                self._run(place, batch)

    def _leave(self, place: BlockPlace) -> None:
        """Compute the next layer's inputs, and give the layer's memory back."""
        self._hidden = [self._run(place, batch) for batch in range(len(self._tokens))]
        if place.layer == self._model.config.num_hidden_layers - 1:
            self._hidden = [self._model.norm(hidden_BTD) for hidden_BTD in self._hidden]
        self._inputs, self._held = None, {}
        _together(self._model, place).to("meta")

    def _run(self, place: BlockPlace, batch: int) -> Tensor:
        """Run the layer on its inputs of one batch, as ``Transformer.features`` does."""
        hidden_BTD, tokens_BT, depth = self._hidden[batch], self._tokens[batch], place.mtp_depth
        length = tokens_BT.shape[1] - depth
        rope, module = self._model.rope(length), _together(self._model, place)
        arguments = [hidden_BTD[:, :length]]
        if depth:
            arguments.append(self._model.embed_tokens(tokens_BT[:, depth:]))
        out_BTD: Tensor = module(*arguments, rope)[0]
        return out_BTD

    def _load(self, module: nn.Module, names: list[str]) -> dict[str, Tensor]:
        """Bring a module to memory; return its weights, which are views of it, by name."""
        module.to_empty(device="cpu")
        wanted = set(names)
        held = {name: view for name, view in named_weights(self._model) if name in wanted}
        for name, weight in held.items():
            weight.copy_(self._weights.read(name, torch.float32))
        return held


def _together(model: Transformer, place: BlockPlace) -> nn.Module:
    """Return the module that is in memory at a time: a block, or an MTP module."""
    return model.mtp[place.mtp_depth - 1] if place.mtp_depth else place.block


def _read_text(folder: Path, text: Path, bos: int, tokens: int) -> tuple[str, list[int]]:
    """Return the SHA-256 of a text, and the tokens of so much of it as ``tokens`` can need."""
    tokenizer = read_tokenizer(folder / TOKENIZER_FILE)
    try:
        data = text.read_bytes()
        decoded = data.decode()
    except OSError as error:
        raise BadInput(f"calibration text {text}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput(f"calibration text {text}: is not UTF-8: give text in UTF-8") from None
    beginning = decoded[: tokens * _MOST_CHARACTERS]
    ids = tokenizer.encode(beginning, add_special_tokens=False).ids
    if not ids:
        raise BadInput(f"calibration text {text}: is empty: give some pages of usual text")
    return hashlib.sha256(data).hexdigest(), [bos, *ids]
