"""How a product is computed fast on this device: one primitive per file, each with the reference that defines it."""
