"""Run language models that are bigger than your GPU from a notebook cell, and see where every layer lives."""
