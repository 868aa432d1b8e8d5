"""Hopper kernels (sm_90): attention to codes by asynchronous matrix products, compiled at run time."""
