"""Placing a model on a machine: policies, bytes, checks and forecasts, and the plan made of them."""
