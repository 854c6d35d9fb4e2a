"""Questions whose answers a rule can judge."""
