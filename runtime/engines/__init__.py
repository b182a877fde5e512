"""One file per inference engine, with the same restrictions as `device`; the runner zip contains one of them."""
