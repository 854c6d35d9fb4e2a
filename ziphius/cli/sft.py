"""``ziphius sft``"""

from __future__ import annotations

from ziphius.cli import answers, options


def sft(
    recipe: options.Recipe,
    checkpoint: options.Start,
    out: options.Out,
    resume: options.Resume = False,
    measure: answers.Measure = "",
    problems: answers.Problems = 100,
    overrides: options.Overrides = None,
) -> None:
    """Fine-tune a CHECKPOINT on conversations: the table sft of the RECIPE.

    sft.source is a file of JSON lines, each with "messages" as OpenAI's clients send them: tools
    and reasoning_content included. Only what the assistant says is learned; conversations that
    share a row don't see one another. The network and the tokenizer are the checkpoint's.

    Example: ziphius sft tiny runs/one --out runs/chat --set sft.source=chats.jsonl
    """
    from ziphius.alignment.sft import fine_tuning
    from ziphius.cli.stages import run_stage

    run_stage(
        "sft",
        fine_tuning,
        recipe,
        checkpoint,
        out,
        resume=resume,
        overrides=overrides,
        questions=answers.Questions(measure, problems),
    )
