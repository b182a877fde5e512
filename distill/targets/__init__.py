"""Where a step's targets come from: the frozen teacher, the moving average of the student, or targets on disk."""
