"""Kernels in Triton, for GPUs of compute capability 8.0 and newer. Imported only where they are used.

Each file has one primitive: its kernels, and operators that launch them, which compilers take as one step. The link to
autograd is where the primitive is defined. Sums have a fixed order, so that the same input gives the same bytes.

`choice.on_cuda` says which tensors they take. Accumulators are float32. With ``TRITON_INTERPRET=1`` in the environment
they run on a CPU, for tests.
"""
