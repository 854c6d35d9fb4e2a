"""``ziphius dpo``"""

from __future__ import annotations

from ziphius.cli import options


def dpo(
    recipe: options.Recipe,
    checkpoint: options.Start,
    out: options.Out,
    resume: options.Resume = False,
    overrides: options.Overrides = None,
) -> None:
    """Let a CHECKPOINT prefer the better of two answers: the table dpo of the RECIPE.

    dpo.source is a file of JSON lines, each with "prompt", "chosen" and "rejected": texts, or
    messages as OpenAI's clients send them. The checkpoint stays the reference that the model is
    kept near to, by dpo.beta. The network and the tokenizer are the checkpoint's.

    Example: ziphius dpo tiny runs/chat --out runs/liked --set dpo.source=pairs.jsonl
    """
    from ziphius.alignment.dpo import preferring
    from ziphius.cli.stages import run_stage

    run_stage("dpo", preferring, recipe, checkpoint, out, resume=resume, overrides=overrides)
