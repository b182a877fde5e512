"""Labelled data sets: folder layouts, splits, cached features and the check for duplicates between training and test images."""
