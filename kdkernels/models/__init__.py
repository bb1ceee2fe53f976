"""Models of others: how they are called, what is captured in them, and the heads of language models."""
