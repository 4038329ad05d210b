"""The Triton kernels of iterative_pinv and nystrom_attention compiled for GPUs that are not here.

Nothing may spill, shared memory must hold, and sm_90 must multiply by wgmma. The launchers run as they are, on meta
tensors. NYSTROMGAN_AOT_FULL=1 compiles every case; without it a choice that meets every kernel.
"""
