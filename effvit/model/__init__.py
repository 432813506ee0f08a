"""The Vision Transformer and its weights on disk."""
