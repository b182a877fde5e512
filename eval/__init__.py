"""Accuracy, fidelity and the report that decides what is deployed."""
