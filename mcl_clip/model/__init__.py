"""Towers, losses and the combination of stages."""
