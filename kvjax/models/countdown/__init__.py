"""Countdown: reach a target with five numbers. The game, and a small model that plays it."""
