"""What a mechanism costs: exact multiply-adds, time and memory, each beside ``fused`` in the same process."""
