"""What a mechanism costs: exact multiply-adds, time and memory, each compared with ``fused`` in the same process."""
