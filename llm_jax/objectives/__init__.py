"""Features and logits to named loss terms."""
