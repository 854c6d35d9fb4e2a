"""The run: objective, optimizer, schedules, balance, one step, and the loop around it."""
