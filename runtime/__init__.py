"""Run exported models: verify their outputs, measure latency and memory on a device."""
