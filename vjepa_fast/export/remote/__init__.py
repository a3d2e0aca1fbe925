"""Files that go into an exported folder as they are: an encoder in plain PyTorch, and what transformers needs of it."""
