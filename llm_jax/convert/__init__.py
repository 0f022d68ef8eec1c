"""Checkpoints of other libraries, both ways: a table of invertible rules a family, and files read tensor by tensor."""
