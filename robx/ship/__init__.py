"""`robx ship`: a plan, in a file or in options, and the run of all its stages from teacher to report."""
