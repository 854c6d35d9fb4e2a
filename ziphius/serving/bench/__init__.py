"""Load against a server that speaks OpenAI's HTTP: how fast it answers, and whether rightly."""
