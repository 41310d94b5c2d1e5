"""The synthetic world that the nano model learns from: scenes of shapes, what is said of them, and samples of both."""
