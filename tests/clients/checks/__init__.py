"""What each client checks. These run in the client's own environment: nothing of ours is there."""
