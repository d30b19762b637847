"""Text that strangers had a hand in, made fit for terminals and saved notebooks. Imports nothing of ours."""
