"""Losses: one file per objective, the shared cross-entropy and Sinkhorn, and the table that builds them."""
