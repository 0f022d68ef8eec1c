"""Models as pure functions of a parameter tree; the only place where flax.linen is used."""
