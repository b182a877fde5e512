"""Labelled data sets: folder layouts, splits, cached features and the check for test images in the training set."""
