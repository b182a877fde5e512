"""The README of a bundle: one template for what all formats share, and one for each runtime's code."""
