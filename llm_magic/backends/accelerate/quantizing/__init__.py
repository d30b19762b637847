"""How a model is packed: which method can, which modules it replaces, what saves them."""
