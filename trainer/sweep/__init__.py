"""Sweeps: many runs over one search space (`trainer.settings.search_space`).

They are numbered and durable, and share what they can.
"""
