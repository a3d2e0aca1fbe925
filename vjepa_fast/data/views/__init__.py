"""What is cut out of a decoded clip: random views for training, fixed ones for evaluation."""
