"""The FP8 GEMM over several pieces."""
