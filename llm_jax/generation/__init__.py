"""Text from a trained model: prefill, decode with a cache, sampling."""
