"""The host side of a benchmark: transports, protocol profiles, results, validity and the record."""
