"""``ziphius grpo``"""

from __future__ import annotations

from ziphius.cli import answers, options


def grpo(
    recipe: options.Recipe,
    checkpoint: options.Start,
    out: options.Out,
    resume: options.Resume = False,
    measure: answers.Measure = "",
    problems: answers.Problems = 100,
    overrides: options.Overrides = None,
) -> None:
    """Let a CHECKPOINT learn from rewards: the table grpo of the RECIPE.

    grpo.tasks are what it is asked: tasks of ours by name, perhaps with a level and a weight
    (sums, gcd:2=0.5), gym:NAME of reasoning-gym, or file:PATH, problems as JSON lines. grpo.rewards
    are what answers are worth (answer, code, math, form, language:en, ...). With grpo.prompt=zero a
    base model is asked as R1-Zero was.

    Example: ziphius grpo tiny runs/chat --out runs/rl --set grpo.tasks=sums,gcd
    --set grpo.steps=100
    """
    from ziphius.alignment.reinforce import learning_from_rewards
    from ziphius.cli.stages import run_stage

    run_stage(
        "grpo",
        learning_from_rewards,
        recipe,
        checkpoint,
        out,
        resume=resume,
        overrides=overrides,
        questions=answers.Questions(measure, problems),
    )
