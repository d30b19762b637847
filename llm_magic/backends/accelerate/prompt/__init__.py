"""From a conversation to a prompt's tokens."""
