"""Frozen teachers: the zoo, published checkpoints and their layouts, timm models, heads and fitted prototypes."""
