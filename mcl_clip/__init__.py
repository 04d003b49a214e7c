"""Multistage contrastive pretraining of CLIP."""
