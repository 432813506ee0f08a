"""Images: `sources` finds them, `preparing` writes them in the prepared format, `loading` reads that as batches."""
