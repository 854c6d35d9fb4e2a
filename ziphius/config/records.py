"""What the tables have in common of stages that learn records from files of JSON lines."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from ziphius.config.pretrain import TrainingConfig


class RecordsConfig(TrainingConfig):
    """``source`` is a file of JSON lines, or several divided by commas.

    The length is ``epochs`` over all samples, or ``steps``, or ``tokens``. ``format`` is how
    conversations are written; one record in ``holdout_every`` is held out.
    """

    usual_epochs: ClassVar[int] = 1

    source: str = ""
    format: Literal["v3", "r1", "v3.1"] = "v3.1"
    epochs: int | None = Field(None, ge=1)
    holdout_every: int = Field(50, ge=2)

    @model_validator(mode="after")
    def _length_is_known(self) -> Self:
        given = [name for name in ("epochs", "steps", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: give one of them")
        return self

    @property
    def passes(self) -> int | None:
        """Over how many epochs the stage goes, unless steps or tokens say how long it is."""
        if self.steps is not None or self.tokens is not None:
            return None
        return self.epochs or self.usual_epochs

    def lasting(self, rows_per_epoch: int) -> Self:
        """Return the table with its length in steps, where that was in epochs of so many rows."""
        if self.passes is None:
            return self
        steps = -(-self.passes * rows_per_epoch // self.batch_size)
        return self.model_copy(update={"steps": steps, "epochs": None})
