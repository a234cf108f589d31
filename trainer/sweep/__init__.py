"""Sweeps: many runs over one search space (`trainer.settings.search_space`), numbered, durable, and sharing what they can."""
