"""Generation: prefill and decode with a key-value cache, sampling, and the text that comes of it."""
