"""Int8 quantization: calibration ranges, the candidates of each format in order, and the quantizers."""
