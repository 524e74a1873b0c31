"""The conformance model: a plain second account of what jobs may do, and the engine checked against it."""
