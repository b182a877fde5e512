"""One file per inference engine, with the same Python 3.8 and numpy restriction as `device`; the runner zip contains one of them."""
