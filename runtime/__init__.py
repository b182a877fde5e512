"""An exported model on the device: the same answers, its latency and its memory."""
