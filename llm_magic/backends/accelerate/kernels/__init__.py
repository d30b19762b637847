"""Kernels for the CPU that no library has, compiled by LLVM for the processor at hand."""
