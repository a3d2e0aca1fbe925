"""What is measured of features and steps: collapse and geometry, FLOP counts, hardware peaks, profiles."""
