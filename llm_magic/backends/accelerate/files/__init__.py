"""Files of weights: parts of them, read, mapped, or written."""
