"""From a torch network and a method to a bundle of ONNX graphs: trace, lower, emit, build, check."""
