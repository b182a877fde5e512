"""Evaluation protocols: kNN, linear, low-shot and transfer, on features of a frozen trunk."""
