"""From a base model to an assistant: SFT, distillation, DPO, GRPO, and what rewards them."""
