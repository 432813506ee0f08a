"""How a product is computed fast on this device: one primitive a file, each beside the reference that defines it."""
