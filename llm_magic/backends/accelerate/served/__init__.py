"""Modules that compute by kernels of ours on the CPU, where these can."""
