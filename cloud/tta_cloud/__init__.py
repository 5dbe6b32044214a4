"""The cloud service: samples in, a larger model beside them, signed patches out. `tta-cloud` is its command line."""
