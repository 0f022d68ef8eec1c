"""What a run needs, takes and costs on a machine that is not there: `llm-jax plan`."""
