"""From text to batches: sources, tokenizer, loader. Nothing here sees a process group."""
