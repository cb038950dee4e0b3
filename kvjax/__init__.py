"""kvjax: a KV cache is a value, and six published methods are small functions on it."""
