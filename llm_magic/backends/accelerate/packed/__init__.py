"""Packed weights, as libraries and checkpoints have them: their bytes, kinds and orders."""
