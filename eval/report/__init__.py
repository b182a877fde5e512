"""The report: collects bundles and measurements, and renders HTML, Markdown and JSON. It measures nothing."""
