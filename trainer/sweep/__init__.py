"""Sweeps: many runs over one search space (`trainer.space`), numbered, durable, and sharing what they can."""
