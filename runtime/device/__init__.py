"""All that runs on the device: Python 3.8, the standard library and numpy only; `native/` is the same runner in C++."""
