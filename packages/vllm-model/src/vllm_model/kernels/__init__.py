"""Triton kernels, one file each, beside the plain torch function that says what the kernel computes; and two in CUDA C++.

Nothing here is imported on a machine without Triton; ``noise`` is torch alone. Shapes the kernels share::

    KV cache of one layer   [num_blocks, num_kv_heads, 2, block_size, head_dim]   2: keys, values
    block tables            int32 [max_slots, max_blocks]                         row: slot, column: position // block_size
    slots                   int32 [rows] or [tokens]                              -1: padding, nothing is read or written

A kernel with a ``pdl`` argument may be launched with programmatic dependent launch (Hopper and later). Then every kernel of the
stream between two full barriers must be, and each waits for the one before it ahead of its first read of an activation. What
they read earlier (weights, the decode plan, cached keys of earlier steps) must have been written at least two launches before.
"""
