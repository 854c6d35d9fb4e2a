"""``ziphius reward``"""

from __future__ import annotations

from ziphius.cli import options


def reward(
    recipe: options.Recipe,
    checkpoint: options.Start,
    out: options.Out,
    resume: options.Resume = False,
    overrides: options.Overrides = None,
) -> None:
    """Make a CHECKPOINT score answers: the table reward of the RECIPE.

    reward.source is a file of JSON lines. For reward.kind=pairwise they have "prompt", "chosen" and
    "rejected", as for dpo; for binary, "prompt", "response" and "label", 0 or 1; for regression,
    "score" in place of the label. They may have the "reasoning" that leads to the score, which the
    model then learns to write itself. The checkpoint gets a second head, score.weight.

    Example: ziphius reward tiny runs/chat --out runs/judge --set reward.source=pairs.jsonl
    """
    from ziphius.alignment.reward_model import scoring
    from ziphius.cli.stages import run_stage

    run_stage(
        "reward",
        scoring,
        recipe,
        checkpoint,
        out,
        resume=resume,
        overrides=overrides,
        network={"num_labels": 1},
    )
