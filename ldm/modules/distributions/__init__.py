"""Distributions that networks parameterise."""
