"""Replace one branch: a small student learns to match a large frozen teacher, without labels."""
