"""The cloud service will live here; see docs/adr/0001-one-vector.md for what it may exchange with an edge."""
