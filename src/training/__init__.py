"""Trains by plain backpropagation, where a claim speaks of trainability."""
