"""The loop and what it is made of: optimizer, state, step, checkpoints, evaluation."""
