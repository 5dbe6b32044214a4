"""The package of the cloud service; this version ships none. docs/adr/0001-one-vector.md says what may cross to it."""
