"""What a response is worth: one small function each."""
