"""The gate: judges each candidate on held-out images, times it against fp32, and decides what ships."""
