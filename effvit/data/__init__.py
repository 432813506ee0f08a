"""Images: `sources` reads them where they are, `preparing` writes the prepared format, the files here read that."""
