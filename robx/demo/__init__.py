"""The demo: distil, evaluate, export, measure and report on real images in minutes, and the images it uses."""
