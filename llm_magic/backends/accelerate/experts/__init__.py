"""Experts of mixtures, and the routers that choose them: what computes them on the CPU."""
