"""One file per inference engine, under the restrictions of `device`; the runner zip contains one of them."""
