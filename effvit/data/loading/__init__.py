"""From the prepared format to what a model takes: images of a split, their views, augmented batches."""
