"""This study's own files: what params.yaml may say, the cells it names, and the tables made of them."""
