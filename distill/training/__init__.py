"""One training run: processes, networks, optimizer, log, checkpoints and the run folder."""
