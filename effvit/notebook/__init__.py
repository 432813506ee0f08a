"""Data, training, scores and pictures as Python calls, for a notebook or a script of one's own."""
