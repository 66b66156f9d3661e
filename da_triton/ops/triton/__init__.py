"""The core and the block in Triton kernels: operators, routes, and cuBLAS GEMMs between kernels."""
