"""From a prompt's tokens to the answer's: the loop, its caches, proposals, captured steps."""
