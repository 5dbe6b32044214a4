"""Streams to try a bundle on: where the images come from, how they shift, and in what order they arrive."""
