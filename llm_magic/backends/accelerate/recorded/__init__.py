"""Decoder layers of the CPU, recorded once as torch's operations, and run without Python for each of them."""
