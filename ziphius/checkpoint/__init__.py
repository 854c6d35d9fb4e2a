"""Names and bytes: the Hugging Face layout, in and out."""
